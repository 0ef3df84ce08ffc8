"""Measure how training changed the singular values and vectors of a base's weights."""
