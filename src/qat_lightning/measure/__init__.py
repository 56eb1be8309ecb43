"""What an int8 network costs and how close it stays."""
