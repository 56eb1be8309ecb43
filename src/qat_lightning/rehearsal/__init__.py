"""Everything up to the int8 file tried on a copy, before the training; and the choice of a mode by it."""
