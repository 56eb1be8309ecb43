"""Tests of the parts of callbacks, mostly without a fit."""
