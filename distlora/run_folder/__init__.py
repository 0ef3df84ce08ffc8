"""Names and records in the folders of runs and sweeps. Needs no torch."""
