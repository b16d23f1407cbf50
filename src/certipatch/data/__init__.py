"""A name or a path to images as the model sees them, every one of them counted or named."""
