"""Put the pretended GPU in place, then run a module: `python -m pretend_cuda.start run_paths ARGUMENTS`."""

from __future__ import annotations

import importlib
import sys

from pretend_cuda import device

if __name__ == "__main__":
    device.install()
    module = sys.argv.pop(1)
    importlib.import_module(f"pretend_cuda.{module}").main()
