"""For operators: whether the process lives, whether it is ready, what it does."""
