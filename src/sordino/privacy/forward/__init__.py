"""Losses of candidate prompts, for methods that see no gradient: exact ones, and clipped and noised ones."""
