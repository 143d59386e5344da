"""Pipelines of other libraries within a budget: planned before they are loaded, with the same results."""
