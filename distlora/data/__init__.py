"""Documents to packed rows."""
