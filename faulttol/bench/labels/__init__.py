"""The parts of the labelled benchmark: its jobs, one trial, what is tried, and what others would say."""
