"""Load the components of a checkpoint's folder, on meta or with their weights, and save them again."""
