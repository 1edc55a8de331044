"""What int8 does to a model: explain, evaluate, suggest."""
