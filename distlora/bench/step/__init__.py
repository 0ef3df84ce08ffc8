"""Compare training steps of ours and of the peers on the same model, sequences and adapter, in turns."""
