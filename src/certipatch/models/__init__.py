"""A timm name, a file of weights or a training run to a network."""
