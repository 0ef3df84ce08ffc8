"""Kernels against library GEMMs and against the peers' sequences of operations: checked first, then timed."""
