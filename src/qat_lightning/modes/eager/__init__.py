"""Mode eager: the network's own modules, replaced one by one; no graph."""
