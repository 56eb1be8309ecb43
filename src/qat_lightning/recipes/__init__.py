"""Recipes that win accuracy back: one file each, functions on plain nn.Modules, without Lightning."""
