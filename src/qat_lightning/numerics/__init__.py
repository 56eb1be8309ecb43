"""Grids, ranges, rounding, and the difference between two tensors."""
