"""NF4 quantization and the adapted linear. Needs torch and triton alone."""
