"""Older releases of torch and transformers: what they lack is said, and names the release."""
