"""Low-rank and other factorizations."""
