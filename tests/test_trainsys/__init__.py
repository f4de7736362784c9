"""Tests of `trainsys`."""
