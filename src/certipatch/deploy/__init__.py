"""A certified model in use: what may be said of an answer, the exported predictor, hub and service."""
