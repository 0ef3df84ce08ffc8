"""The `distlora` command: composes, checks and starts runs. Imports no torch."""
