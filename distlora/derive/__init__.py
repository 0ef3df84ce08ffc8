"""Derive what a model type is from the module that transformers builds: small models of one layer of each kind."""
