"""Layers: how they train, fold BatchNorm, and are called, in every mode."""
