"""Trying all steps up to the int8 file on a copy before training, and choosing the mode by the result."""
