"""A run on meta tensors: which memory is alive when, before a byte of weights is read."""
