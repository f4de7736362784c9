"""Benchmarks of the trainer's parts: `python -m trainsys.bench.<name>`."""
