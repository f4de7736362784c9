"""What the benchmark of iterations compares."""
