"""Layers: how they are trained, folded and called in any mode."""
