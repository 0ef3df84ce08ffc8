"""Evaluate base, adapted and merged models side by side."""
