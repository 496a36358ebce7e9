"""Noised losses: every example's losses of the candidates are clipped as one vector, and the sum is noised.

What a forward-only method learns of images is the losses of a few candidate prompts. Here they are released as DP-SGD
releases a gradient. For two candidates and relative measures that is the clipped scalar of DPZero (Zhang, Li,
Thekumparampil, Oh and He, ICML 2024, arXiv 2310.09639) and DP-ZO (Tang, Panda, Nasr, Mahloujifar and
Mittal, 2024, arXiv 2401.04343):
(d / 2, -d / 2) has norm |d| / sqrt(2), so a clip of c bounds the difference d by sqrt(2) c. The noise on the difference
of the two numbers is sqrt(2) times as large, so it stands in the same ratio to that bound. What is noised here in
addition, the sum of the two, carries nothing and is not used.

Sensitivity. Neighboring data sets differ in one example of one client, added or removed; the divisor, the expected
size of a batch, stays the same. Example b contributes r_b = clip(m_b - mean(m_b)), or clip(m_b - ln C), where m_b has
the losses of the V P pairs of look and candidate on that example. Candidates depend on earlier releases and on coins,
looks on coins. So r_b depends on example b alone beside them, and |r_b| <= c; an example that is not finite has the
vector zero. The sum over the sample changes by one such vector, by at most c, and by exactly c where an example's
vector is at least that long: the L2 sensitivity is c. With noise N(0, (z c)^2) on every number and Poisson sampling at
rate q, an answer is a Gaussian mechanism of noise multiplier z, subsampled at q. If the person is the unit, a person
has one vector, the clipped sum of all their examples' (`sordino.privacy.persons`). Ranks, steps and everything else
that a method makes of answers are post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.clipping import clipped_sum, wide
from sordino.privacy.dp_sgd import sampled
from sordino.privacy.forward.losses import Answer, Question, answer, measured
from sordino.privacy.gradients import Batch, Parameters
from sordino.privacy.persons import person_sums, together
from sordino.randomness import Randomness, noised


@dataclass(frozen=True)
class NoisedLosses:
    """Losses of clipped examples, or of clipped persons, divided by the expected batch size, with noise.

    Attributes:
        model: the frozen model.
        clip: c, the largest norm that an example's measures of all candidates keep, or a person's sum of them.
        noise_multiplier: z.
        randomness: the source of the noise.
        call: the number of this answer in the round, so that no noise is drawn twice.
    """

    model: PromptModel
    clip: float
    noise_multiplier: float
    randomness: Randomness
    call: int = 0

    def __call__(self, question: Question, candidates: Parameters, fixed: Parameters, batch: Batch) -> Answer:
        sampling = sampled(batch)
        measures = measured(self.model, question, candidates, fixed, batch)
        each, losses = wide(measures.each), []
        sums = each.new_zeros(len(each), *each.shape[2:])
        for client in range(len(each)):
            chosen = batch.mask[client].nonzero().flatten()
            pieces = [{"losses": each[client, chosen]}]
            if batch.persons is not None:
                chosen = chosen[together(batch.persons[client, chosen])]
                pieces = list(person_sums([{"losses": each[client, chosen]}], batch.persons[client, chosen]))
            for piece in pieces:
                sums[client] += clipped_sum(piece, self.clip)["losses"]
            losses.append(measures.loss[client].sum() / measures.counted[client].sum().clamp(min=1))
        noise = self.randomness.normal(f"noise on losses, {self.call}", *sums.shape[1:])
        released = noised(sums, self.clip * self.noise_multiplier, noise).to(measures.each)
        means = released / sampling.expected.to(released)[:, None, None]
        return answer(self.model, question, means, torch.stack(losses))
