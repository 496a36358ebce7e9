"""Runs, comparisons and plans, and the directories that they leave."""
