"""Serve training and sampling of many adapters on one base, over the protocol of the Tinker SDK."""
