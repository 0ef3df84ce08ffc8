"""What results are written with: tables, plots, words for numbers, the files in a folder. Imports no torch."""
