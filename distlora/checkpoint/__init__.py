"""What a run has made so far and nothing of the base: whole on the disk, or not there at all (README.md here)."""
