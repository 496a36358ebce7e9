"""Mechanisms of differential privacy, the ledger of what they release, and its accounting.

- Clips: `dp_sgd.py` and `cotangent.py` every example's gradient, `client_level.py` every client's upload.
- Adds noise at the clients: `dp_sgd.py` and `cotangent.py` to gradients, `client_level.py` (`client_end`) to uploads.
- Adds noise at the server: `server_end` of `example_level.py` and `client_level.py`, to means, once each.
- Adds noise in shares: `sordino.secure.sums.client`, on terms that `secure_mean.py` gives both ends.
- Draws it: `sordino.randomness`, from the operating system unless a run is a simulation.
- Enters it: `entered` of both mechanisms, from the rates drawn; `charge` in `mechanism.py`, for a secure sum.
- Holds it against the plan: `Mechanism.check`, at each client before anything leaves, and again at the server.
- Adds it up: `accounting.py`, by observer and over parties' data; `statement.py` says it in words.
"""
