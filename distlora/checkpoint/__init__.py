"""Save, restore and verify the state of a run, without the base (README.md)."""
