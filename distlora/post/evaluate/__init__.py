"""What models make of a text: base, adapted and merged, side by side."""
