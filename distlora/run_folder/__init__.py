"""What is in a run's and a sweep's folder. Imports no torch."""
