"""Measure the loss of 4-bit quantization of a base: `distlora analyze quantization`."""
