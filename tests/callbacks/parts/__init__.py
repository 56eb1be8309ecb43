"""Tests of what the callbacks are put together from, most of them without a fit."""
