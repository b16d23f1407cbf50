"""Where a run takes place: devices, processes, progress and the two consoles."""
