"""Measured tables of what each technique costs and saves, on the reader's own machine and model."""
