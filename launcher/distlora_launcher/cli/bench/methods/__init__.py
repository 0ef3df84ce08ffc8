"""`distlora bench methods`: compare adapter methods and full fine-tuning on one base and data."""

from distlora_launcher.cli.bench.methods.run import main

__all__ = ["main"]
