"""What a run took: seconds, peaks of memory, bytes moved."""
