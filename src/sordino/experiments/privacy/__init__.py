"""The cost of a run in privacy, in words: the plan before it, and the statement after it."""
