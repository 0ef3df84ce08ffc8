"""`distlora demo`; see README.md beside this file."""
