"""Calls of a network, its inputs and outputs, its modules in order, and its graph."""
