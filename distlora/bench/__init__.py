"""Benchmarks against the peers: each checks that both sides did the work, then prints one Markdown table."""
