"""Score answers that a model sampled: rewards, their processes, and the sandbox for code. Imports no torch."""
