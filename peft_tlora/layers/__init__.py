"""What an adapter computes in each kind of layer."""
