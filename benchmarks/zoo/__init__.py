"""All of timm's families through fit, int8, saved and loaded: ``python -m benchmarks.zoo``."""
