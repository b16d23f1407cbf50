"""One self-contained page out of the records of some runs."""
