"""What an adapter, or full fine-tuning, did to the singular values and vectors of a base's weights."""
