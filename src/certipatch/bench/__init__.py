"""How fast it is, against the published code, on a model and data of one's own."""
