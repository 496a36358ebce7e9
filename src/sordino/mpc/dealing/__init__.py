"""Correlated randomness: which functions of masks are dealt, by whom, and what they cost."""
