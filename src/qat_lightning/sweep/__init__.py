"""Sweeps: the results of trials, resuming them, and the summary at the end. Hydra launches the trials."""
