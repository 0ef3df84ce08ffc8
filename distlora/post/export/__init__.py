"""Export a trained model in formats of other programs, each checked with its real client."""
