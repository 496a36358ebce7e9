"""Correlated randomness: masks and functions of masks, the dealer, the parties' supply, and costs."""
