"""Post-training by reinforcement learning: verifiable tasks, policies, GRPO losses, shared rollouts."""
