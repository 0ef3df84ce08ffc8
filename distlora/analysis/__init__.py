"""What can be learned of a base and of an adapter by looking at them: `distlora analyze ...`."""
