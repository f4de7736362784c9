"""Tests of every package; run with `make test`."""
