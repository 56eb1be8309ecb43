"""What the callbacks are put together from."""
