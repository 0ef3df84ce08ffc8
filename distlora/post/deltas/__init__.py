"""An adapter and its base as weights on disk: read, added and written one at a time, never a model."""
