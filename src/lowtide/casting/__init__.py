"""Weights that rest in 8 bits."""
