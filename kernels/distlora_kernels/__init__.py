"""Quantize to NF4 and run adapted linears on quantized or dense weights. Needs only torch and triton."""
