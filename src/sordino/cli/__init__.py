"""The command line: parses, calls, prints. Its modules hold no logic."""
