"""Measure the intrinsic dimension of fine-tuning: `distlora analyze intrinsic`."""
