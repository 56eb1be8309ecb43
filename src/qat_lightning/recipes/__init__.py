"""Recipes that recover accuracy: one per file, as functions on plain nn.Modules, without Lightning."""
