"""Submodules of a network, each prepared separately in mode fx."""
