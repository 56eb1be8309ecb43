"""What a network looks like from outside and as a graph: calls of it, what they return, its modules in order."""
