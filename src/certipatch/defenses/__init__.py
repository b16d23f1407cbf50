"""The certified defenses: what one is stands in contract.py; a defense is a folder."""
