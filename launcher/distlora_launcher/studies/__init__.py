"""`distlora sweep`: many runs that are compared (README.md)."""
