"""`distlora bench methods`: adapter methods and full fine-tuning on one base and data, as a table and a plot."""

from distlora_launcher.cli.bench.methods.run import main

__all__ = ["main"]
