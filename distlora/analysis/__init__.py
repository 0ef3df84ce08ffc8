"""Analyze a base and what was trained on it: `distlora analyze ...`."""
