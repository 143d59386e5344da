"""A server that admits work by its predicted peak: requests, a queue, and a process of its own that computes."""
