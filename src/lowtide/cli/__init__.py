"""The command `lowtide`: parse, call the library, print. Nothing here imports torch at the top."""
