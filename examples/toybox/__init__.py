"""Toybox: a tiny text-to-image model and the rendered scenes it learned from."""
