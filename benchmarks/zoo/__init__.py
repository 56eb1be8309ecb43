"""All of timm's model families: trained, converted, saved and loaded with ``python -m benchmarks.zoo``."""
