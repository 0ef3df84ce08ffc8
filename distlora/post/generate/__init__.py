"""Text from a model that is being trained, or was: samples between steps, and `distlora generate`."""
