"""Tests of `offload`."""
