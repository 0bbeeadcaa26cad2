"""What can be said of a kernel without a GPU: ``python -m bench static``."""
