"""What every implementation of a protocol promises; the tests of each subclass these."""
