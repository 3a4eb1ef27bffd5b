"""Structured pruning: smaller dense models."""
