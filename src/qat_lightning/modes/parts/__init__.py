"""Submodules of a network, each prepared by the best mode that takes it."""
