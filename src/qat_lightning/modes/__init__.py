"""The three ways from a float module to int8, on plain modules."""
