"""FedPrompt: only the soft prompt is trained and exchanged, and averaged by the clients' numbers of examples.

Zhao, Du, Li, Li, Liu, FedPrompt: Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning,
ICASSP 2023; sections are those of arXiv 2208.12268. The model is split into a frozen part and a prompt, and only the
prompt is aggregated (III.B). Clients may add noise to their uploads (local differential privacy, IV.F). One client of
ten poisons its data (III.C, IV.B). Here the noise is `[privacy] mechanism = "dp-fedavg", noise_by = "client"`, for
every method. It is Gaussian, on a clipped change; the paper clips gradients and adds Laplace noise, of unstated size,
to parameters. With it every client counts the same. The poisoned client is the `[poisoning]` table. The server's
answers to it, which the paper leaves for later (V), are `[runtime] aggregation`.

It shares PromptFL's local round and differs from it in three things. The prompt starts at words of the vocabulary
rather than at noise near zero (Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning,
EMNLP 2021, section 3.2, whose setup the paper follows). Clients step with Adam on 20 vectors (IV.A). The server
averages and does nothing else.

The authors' code was not found. Where the paper is silent, the choices are those of their code for poisoned prompts on
one machine (Du et al., PPT, IJCAI 2022: batches of 32 examples, words of the vocabulary as an option), or these. The
paper's prompt stands before a text whose class is a word to be filled in. Here it stands before a class name, as in
CoOp, and the image tower is frozen like the rest. The words are drawn from English's most frequent ones, because
encoders have different vocabularies. The rate is CoOp's: the paper's 0.3 is for BERT and T5, whose embeddings are far
larger than CLIP's. The optimizer starts afresh each round, as in PromptFL: its moments belong to a prompt that the
average replaced. The paper varies local iterations from 100 to 1500; here they default to PromptFL's, so that the two
compare.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from sordino.algorithms import base
from sordino.algorithms.base import InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.promptfl import ABOUT as PROMPTFL
from sordino.algorithms.promptfl import Broadcast, ClientState, Upload, client_init, client_round, prompt
from sordino.algorithms.settings.fedprompt import Settings
from sordino.prompts.contexts import vocabulary_context

__all__ = [
    "ABOUT",
    "Broadcast",
    "ClientState",
    "Server",
    "Settings",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "server_init",
    "server_round",
]

ABOUT: MethodInfo = replace(
    PROMPTFL,
    paper="Zhao et al., FedPrompt, ICASSP 2023 (arXiv 2208.12268)",
    privacy="data stay; noise of each client on what it sends, as an option",
)


@dataclass(frozen=True)
class Server(base.Server):
    context: Tensor  # [M, E], the shared prompt


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    def draw(count: int) -> Tensor:
        return init.streams.common_normal("words", count)

    return Server(vocabulary_context(settings.initial_context, settings.context_length, init.embed, draw))


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.context)


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    return Server(server.context + uploads.mean("change"))
