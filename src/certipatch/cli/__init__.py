"""The command line: a file for each command; begin with app.py."""
