"""What a run costs in privacy, in words: the plan before it, and the statement after it."""
