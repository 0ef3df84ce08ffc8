"""Read command-line arguments and write to the terminal."""
