"""Attacks on the defended model, and the harness that does not believe them."""
