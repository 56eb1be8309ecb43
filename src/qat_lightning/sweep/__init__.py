"""Sweeps: what a trial leaves, how it goes on, and how the whole ends. Hydra launches; nothing here quantizes."""
