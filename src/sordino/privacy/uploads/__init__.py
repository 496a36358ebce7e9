"""The ways in which clients' vectors travel to a mean: in a secure sum, or as integers whose rounding is the noise."""
