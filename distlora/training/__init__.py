"""A run: its steps, what they are measured by, what is due after them."""
