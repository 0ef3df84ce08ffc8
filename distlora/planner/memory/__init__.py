"""Memory of a rank on its device."""
