"""Work with a trained model: generate, evaluate, merge, combine and export."""
