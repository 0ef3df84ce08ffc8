"""Documents to packed rows: formats -> templates -> packing -> cache -> rows -> loader (see README.md)."""
