"""Runs as jobs of SLURM: the script that is written and submitted, SLURM's commands, and the record of a job."""
