"""Benchmarks that anyone can run: ``python -m benchmarks.<name>``; each prints one table."""
