"""What is written down of each run, and the only code that reads it again; nothing here loads torch."""

from .read import read_records

__all__ = ["read_records"]
