"""distlora: multi-GPU QLoRA training. Importing it has no effects; import the module that you need."""
