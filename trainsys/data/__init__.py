"""Text to token windows."""
