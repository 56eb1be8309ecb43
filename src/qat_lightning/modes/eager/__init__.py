"""Mode eager: the network's own layers are replaced one by one, without a graph."""
