"""Tables and pictures from records; never loads torch."""
