"""Prompt parameterizations that several methods share."""
