"""The command ``int8fx``."""
