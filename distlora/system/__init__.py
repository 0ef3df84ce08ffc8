"""Share what every process needs: exit codes, atomic files, signals, host memory, progress. Imports no torch."""
