"""A checkpoint on disk to a rank's quantized shard."""
