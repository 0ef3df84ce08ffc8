"""Adapters' folders in PEFT's format: read, judged, written. Without PEFT."""
