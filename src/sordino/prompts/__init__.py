"""Prompt parameterisations that several methods share."""
