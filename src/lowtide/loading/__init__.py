"""From a checkpoint's folder to its components, on meta or with their weights, and back."""
