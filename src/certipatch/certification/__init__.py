"""A data set to one record an image, with any certified defense, and back to the defended model."""
