"""Sites of several owners: what each allows, what it answers, and the coordinator that asks them over any engine."""
