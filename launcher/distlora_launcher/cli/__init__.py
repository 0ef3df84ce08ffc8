"""Commands on what was trained, after training."""
