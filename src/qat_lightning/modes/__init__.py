"""The modes, which convert a float module to int8; on plain modules without Lightning."""
