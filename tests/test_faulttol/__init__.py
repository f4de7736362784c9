"""Tests of `faulttol`."""
