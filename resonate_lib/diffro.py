"""Differentiable reward optimisation (DiffRO): the gradient of the reward itself, not an estimate from how clips compare.

For discrete tokens it passes through Gumbel-Softmax draws; what both speech notebooks need of it stands first: the draw, its
temperature, and which groups are worth learning from. Sources: DiffRO (arXiv 2507.05911, 2509.18569), Gumbel-Softmax
(arXiv 1611.01144).
"""

import torch
from torch import Tensor

SPREAD_SHARE = 0.05  # of the median: the least that counts as the spread of lengths, so that equal siblings exclude nobody


def gumbel_softmax(logits: Tensor, *, temperature: float, hard: bool = True, generator: torch.Generator) -> Tensor:
    """A draw from softmax(logits) that can be differentiated: softmax((logits + g) / temperature), g standard Gumbel noise.

    logits (..., V). Returns weights (..., V) like logits that sum to 1. hard: the one-hot vector of the largest, which is an exact
    draw at any temperature, with the gradient of the weights (straight-through); the lower the temperature, the less
    that gradient is biased and the more it scatters. g is drawn from `generator`, on its device.
    Source: Gumbel-Softmax (arXiv 1611.01144). ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0; 1 or less is usual")
    exponential = torch.empty(logits.shape, dtype=torch.float32, device=generator.device).exponential_(generator=generator)
    noise = -exponential.clamp_min(torch.finfo(torch.float32).tiny).log().to(logits)
    weights = ((logits + noise) / temperature).softmax(-1)
    if not hard:
        return weights
    chosen = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0)
    return chosen + (weights - weights.detach())


def temperature_at(step: int, steps: int, start: float, end: float) -> float:
    """The temperature of `step` (from 0) of `steps`: start·(end/start)^(step/(steps - 1)), down by equal ratios."""
    return start * (end / start) ** (min(step, steps - 1) / max(steps - 1, 1))


def keep_groups(
    rewards: Tensor, group_ids: Tensor, *, lengths: Tensor | None = None, failed: Tensor | None = None, min_spread: float,
    length_deviations: float,
) -> tuple[Tensor, dict[str, int]]:  # fmt: skip
    """Which samples to learn from: mask (n,) bool, and how many left for which reason (the first that applies).

    rewards, group_ids, lengths (tokens or seconds) and failed (bool): (n,). In this order:
    "failed": what `failed` marks, and rewards that are not finite;
    "length": further from the median length of its group than length_deviations deviations; a deviation is 1.4826 times the
    median distance from that median (a normal distribution's own), at least SPREAD_SHARE of it;
    "spread": of what is left of a group the rewards' population deviation is min_spread or less: siblings that tie, or one
    alone, compare with nobody.
    """
    mask, counts = torch.ones(len(rewards), dtype=torch.bool), {"failed": 0, "length": 0, "spread": 0}
    rewards, group_ids = rewards.detach().double().cpu(), group_ids.cpu()

    def drop(reason: str, bad: Tensor) -> None:
        counts[reason] += int((mask & bad).sum())
        mask.logical_and_(~bad)

    bad = ~torch.isfinite(rewards)
    drop("failed", bad if failed is None else bad | failed.cpu().bool())
    groups = [group_ids == group for group in group_ids.unique()]
    for members in groups if lengths is not None else ():
        own = lengths.detach().double().cpu()
        kept = own[members & mask]
        if len(kept):
            middle = kept.quantile(0.5)
            spread = torch.maximum(1.4826 * (kept - middle).abs().quantile(0.5), SPREAD_SHARE * middle)
            drop("length", members & ((own - middle).abs() > length_deviations * spread))
    for members in groups:
        kept = rewards[members & mask]
        if len(kept) and not kept.std(correction=0) > min_spread:
            drop("spread", members)
    return mask, counts
