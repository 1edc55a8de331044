"""What benchmarks, the demo and the command share."""
