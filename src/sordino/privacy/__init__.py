"""How gradients are obtained, and the ledger of what was released with noise."""
