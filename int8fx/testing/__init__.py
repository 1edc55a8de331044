"""What the tests and benchmarks share: bounds, toy models, random graphs, a GPU that is not there."""
