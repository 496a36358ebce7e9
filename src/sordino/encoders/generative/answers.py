"""Class names as answers: a tree of their tokens, so that common beginnings are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.encoders.base import ClassTokens


@dataclass(frozen=True)
class Answers(ClassTokens):
    """The tokens of C names, and the tree of their beginnings.

    A node is a beginning of one or more names: at least one token, and not the whole name. The last token of a name
    needs no node, as nothing is predicted after it. Node 0 of `before` is the dialog itself, node r + 1 the r-th of R.

    Attributes:
        names, embeddings, mask: see `ClassTokens`; nothing closes a name.
        ids: [C, L] the tokens; padded with 0.
        tokens: [R] the last token of each node; a parent stands before its children.
        depths: [R] the number of tokens of each node.
        sees: [R, R] bool, true where the second node is a beginning of the first, or the first itself.
        before: [C, L] the node after which each token of a name is predicted.
    """

    ids: Tensor
    tokens: Tensor
    depths: Tensor
    sees: Tensor
    before: Tensor

    @classmethod
    def of(cls, names: Sequence[str], tokens: Sequence[Sequence[int]], table: Tensor) -> Answers:
        """Make the tree.

        Args:
            names: of C classes.
            tokens: each name's.
            table: [V, E] token embeddings.
        """
        device, length = table.device, max(map(len, tokens), default=0)
        nodes: dict[tuple[int, ...], int] = {}
        for name in tokens:
            for stop in range(1, len(name)):
                nodes.setdefault(tuple(name[:stop]), len(nodes))
        before = [[0 if at == 0 else nodes[tuple(name[:at])] + 1 for at in range(len(name))] for name in tokens]
        sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for beginning, row in nodes.items():
            for stop in range(1, len(beginning) + 1):
                sees[row, nodes[beginning[:stop]]] = True
        ids = _padded(tokens, length).to(device)
        mask = torch.tensor([[at < len(name) for at in range(length)] for name in tokens], device=device)
        return cls(
            names=tuple(names),
            embeddings=table[ids].to(torch.promote_types(table.dtype, torch.float32)),
            mask=mask.view(len(names), length),
            ids=ids,
            tokens=torch.tensor([node[-1] for node in nodes], dtype=torch.int64, device=device),
            depths=torch.tensor([len(node) for node in nodes], dtype=torch.int64, device=device),
            sees=sees.to(device),
            before=_padded(before, length).to(device),
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return the mean log-likelihood [N, C] of each name's tokens, in nats.

        Args:
            logits: [N, 1 + R, V] of the token after the dialog, and after each node.
        """
        totals = logits.logsumexp(-1)  # [N, 1 + R]
        chosen = logits[:, self.before, self.ids]  # [N, C, L]
        likelihoods = torch.where(self.mask, chosen - totals[:, self.before], 0.0)
        return likelihoods.sum(-1) / self.mask.sum(-1)


def _padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    padded = [[*row, *[0] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)
