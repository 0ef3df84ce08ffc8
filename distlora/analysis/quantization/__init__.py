"""What a base is like before it is trained: what 4 bits cost it (`distlora analyze quantization`)."""
