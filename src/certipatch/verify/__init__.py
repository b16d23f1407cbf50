"""Check what the other rooms wrote, with code that imports nothing of what it checks (start in ``check``)."""
