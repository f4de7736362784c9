"""Tests of `parallel`."""
