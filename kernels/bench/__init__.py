"""Check the kernels and time them beside library GEMMs and other libraries."""
