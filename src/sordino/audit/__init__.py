"""What an adversary learns of the training data from what was released, measured rather than promised."""
