"""Checkpoints on disk: header index, legacy names, filling a module, saving. Knows no pipeline and no device policy."""
