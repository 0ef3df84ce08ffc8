"""Benchmarks of training, loading and saving beside other libraries, and of the memory plan beside a real step."""
