"""Reports of analyses and benchmarks: tables, plots, and the files that hold them. Imports no torch."""
