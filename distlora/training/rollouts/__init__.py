"""Rollouts of online reinforcement learning: answers that the model samples, and trains on."""
