"""Runtimes of a federation: they move the messages of a method, and nothing else."""
