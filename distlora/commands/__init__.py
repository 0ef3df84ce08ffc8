"""What all commands share: how they end, what their workers say."""
