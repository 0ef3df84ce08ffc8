"""Multi-trial training: trials of a sweep share one base, its all-gathers and its dequantization (README.md)."""
