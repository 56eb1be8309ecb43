"""Execution of decomposed graphs. Importing it loads neither torchao nor a compiler."""
