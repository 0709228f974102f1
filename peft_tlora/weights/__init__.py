"""What travels with an adapter: its start, its schedule as a tensor, what its weights tell."""
