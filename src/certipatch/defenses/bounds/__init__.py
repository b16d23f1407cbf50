"""Bounds through the network: every content of a patch at once, as a box of images."""
