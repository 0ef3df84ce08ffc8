"""What a run trained, in formats that others load, each loaded again by its real client before it is called done."""
