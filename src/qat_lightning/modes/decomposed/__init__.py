"""What runs a decomposed graph. It imports neither torchao nor a compiler before one is used."""
