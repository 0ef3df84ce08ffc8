"""Rollouts of online reinforcement learning: answers that the model samples in turn with its training."""
