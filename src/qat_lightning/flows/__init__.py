"""One file a mode: a float module becomes a prepared module, and a prepared module an int8 one, without Lightning."""
