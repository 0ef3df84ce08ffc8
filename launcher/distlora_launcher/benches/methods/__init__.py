"""`distlora bench methods`: adapter methods and full fine-tuning on one base and data, as a table and a plot."""

from distlora_launcher.benches.methods.run import main

__all__ = ["main"]
