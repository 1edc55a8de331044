"""How a weight's codes and scales are chosen: an algorithm a file, and ``methods.py``, their table."""
