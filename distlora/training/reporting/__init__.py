"""Where a run's figures go: metrics.jsonl, wandb, the terminal."""
