"""What the benchmarks of the recorder are made of: ranks that can be told to let go, and callers of collectives."""
