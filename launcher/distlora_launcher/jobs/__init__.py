"""Runs as SLURM jobs: the script, SLURM's commands, submission."""
