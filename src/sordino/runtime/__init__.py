"""Runtimes move the messages of a method, and nothing else."""
