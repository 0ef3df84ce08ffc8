"""Write results as tables, plots and files. Imports no torch."""
