"""Combine adapters of one base: sums, differences, truncation to a rank, TIES and DARE."""
