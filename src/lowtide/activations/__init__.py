"""Activations in memory: sliced, tiled and exact row by row; nothing here knows where weights rest."""
