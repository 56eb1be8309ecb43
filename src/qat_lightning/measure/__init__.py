"""Measurements of an int8 network: size, speed, and agreement with fake-quant."""
