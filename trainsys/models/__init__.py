"""Models the trainer builds."""
