"""Clustering and averaging of what no party may see, on Lagrange shares (SecPC of SecFPP); and sums (`secure.sums`).

Hou, Li and Buyukates, Privacy-preserving Prompt Personalization in Federated Learning for Multimodal Large Language
Models, 2025 (arXiv 2505.22447); on Lagrange coded computing, Yu et al., AISTATS 2019 (arXiv 1806.00939).

    setup = plan(clients=12, width=8, largest=1.0, privacy=2)
    clients = [Client(number, point) for number, point in enumerate(points)]      # points [12, 8], within [-1, 1]
    found = run(clients, Server(setup), Adaptive()).result                        # found.labels: a cluster a client
"""

from sordino.secure.adaptive import Adaptive, adaptive
from sordino.secure.cipher import Cipher, PlainCipher
from sordino.secure.client import Client
from sordino.secure.clustering import (
    NOBODY,
    Clusters,
    PlainDistances,
    farthest_first,
    finish,
    lloyd,
    renamed,
    to_one_scale,
)
from sordino.secure.encryption import EncryptingCipher
from sordino.secure.errors import SecureError, TooFewAnswers, TooManyErrors
from sordino.secure.local import (
    ITERATIONS,
    Carrier,
    Outcome,
    Party,
    Refusal,
    SharedExchange,
    Traffic,
    answered,
    carry_exchange,
    in_process,
    run,
    run_average,
    run_exchange,
)
from sordino.secure.mailbox import Rejection
from sordino.secure.pairs import Pairs
from sordino.secure.search import Start, search
from sordino.secure.server import Averages, RevealedDistances, Server
from sordino.secure.setup import Setup, fewest_members, plan
from sordino.secure.sums.charge import Charge, charge, client_sensitivity, example_sensitivity
from sordino.secure.sums.client import SumClient
from sordino.secure.sums.discrete_gaussian import discrete_gaussian, system_bits
from sordino.secure.sums.local import NoisedSum, local_sum, noised_sum
from sordino.secure.sums.plan import plan_sum
from sordino.secure.sums.server import SecureSum, SumServer
from sordino.secure.sums.setup import SumSetup

__all__ = [
    "ITERATIONS",
    "NOBODY",
    "Adaptive",
    "Averages",
    "Carrier",
    "Charge",
    "Cipher",
    "Client",
    "Clusters",
    "EncryptingCipher",
    "NoisedSum",
    "Outcome",
    "Pairs",
    "Party",
    "PlainCipher",
    "PlainDistances",
    "Refusal",
    "Rejection",
    "RevealedDistances",
    "SecureError",
    "SecureSum",
    "Server",
    "Setup",
    "SharedExchange",
    "Start",
    "SumClient",
    "SumServer",
    "SumSetup",
    "TooFewAnswers",
    "TooManyErrors",
    "Traffic",
    "adaptive",
    "answered",
    "carry_exchange",
    "charge",
    "client_sensitivity",
    "discrete_gaussian",
    "example_sensitivity",
    "farthest_first",
    "fewest_members",
    "finish",
    "in_process",
    "lloyd",
    "local_sum",
    "noised_sum",
    "plan",
    "plan_sum",
    "renamed",
    "run",
    "run_average",
    "run_exchange",
    "search",
    "system_bits",
    "to_one_scale",
]
