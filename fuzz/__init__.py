"""Coverage-guided fuzzing: what must hold of any bytes at all. `python -m fuzz parser --minutes 10`."""
