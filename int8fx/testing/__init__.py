"""For running other people's tests on int8fx; needs pytest."""
