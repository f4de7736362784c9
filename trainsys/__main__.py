"""`python -m trainsys` and the `trainsys` command."""

from trainsys.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
