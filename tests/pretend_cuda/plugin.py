"""Pytest plugin: `PRETEND_CUDA=run python -m pytest -p pretend_cuda.plugin -m gpu` runs tests of a GPU without one."""

from pretend_cuda import device

device.install()
