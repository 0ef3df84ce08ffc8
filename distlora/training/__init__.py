"""Training: set-up, the loop, objectives, optimizers, metrics and what follows each step."""
