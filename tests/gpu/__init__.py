"""What needs a GPU: the trainer on CUDA against the same plain loops and checkpoints as on the CPU."""
