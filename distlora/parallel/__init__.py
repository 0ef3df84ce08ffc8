"""Sharding and gradient reduction."""
