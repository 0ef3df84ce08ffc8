"""Measure a save and a resume of a run, ours beside PEFT's, Trainer's and accelerate's."""
