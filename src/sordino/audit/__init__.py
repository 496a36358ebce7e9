"""Attacks that measure what an adversary learns of the training data from a run's releases."""
