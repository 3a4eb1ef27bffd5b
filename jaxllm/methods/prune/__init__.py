"""Pruning: which weights stay."""
