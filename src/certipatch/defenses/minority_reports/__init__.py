"""Minority Reports: an alarm where a confident masked view disagrees, with a certificate of its own."""
