"""Configurations for Hydra: put ``pkg://qat_lightning.conf`` into ``hydra.searchpath``."""
