"""What ``explain`` found, as data, text, a page and pictures."""
