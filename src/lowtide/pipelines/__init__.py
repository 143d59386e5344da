"""Pipelines: from a prompt to pictures, along the data's path."""
