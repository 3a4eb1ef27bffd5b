"""Searches over specs under a measured budget."""
