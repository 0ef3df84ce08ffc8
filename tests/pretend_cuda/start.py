"""Put the pretended GPU in place, then run a module: `python -m pretend_cuda.start run_paths ARGUMENTS`."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from pathlib import Path

from pretend_cuda import device, library

if __name__ == "__main__":
    device.install()
    module = sys.argv.pop(1)
    with tempfile.TemporaryDirectory(prefix="pretend-cuda-cache-") as cache:
        # These processes prove each model once and share the result. The cache of other tests has unproved models.
        proved = library.CACHE / "architectures"
        proved.mkdir(exist_ok=True)
        Path(cache, "architectures").symlink_to(proved)
        os.environ["DISTLORA_CACHE"] = cache
        importlib.import_module(f"pretend_cuda.{module}").main()
