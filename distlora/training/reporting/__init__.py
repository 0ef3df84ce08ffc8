"""Report a run's metrics: metrics.jsonl, wandb, the terminal."""
