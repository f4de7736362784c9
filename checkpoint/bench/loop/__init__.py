"""A training loop, the savers that can be put into it, and the memory they take."""
