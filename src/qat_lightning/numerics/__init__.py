"""Grids, ranges, rounding, and how far two tensors are apart."""
