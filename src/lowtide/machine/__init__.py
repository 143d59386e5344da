"""This computer: its memory, its processors, its heap, and how fast its kernels, its disk and its link are."""
