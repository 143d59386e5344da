"""Less memory for activations: networks computed a picture at a time, in blended tiles, or exactly row by row.

Nothing here knows where weights rest.
"""
