"""Minimum word error rate training: the loss of a group of sampled hypotheses, and which of them are different ones.

Source: Prabhavalkar et al. 2018 (arXiv 1712.01818), with sampled hypotheses in place of a beam's. Training is in `recognition_rl`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mwer_loss(log_probs: Tensor, errors: Tensor, group_ids: Tensor, distinct: Tensor) -> Tensor:
    """Expected word errors of the distinct hypotheses of each utterance, less their mean, averaged over utterances; 0-dim.

    log_probs (n,): of whole hypotheses; errors, group_ids (n,); distinct (n,) bool: the first of equal ones. With P renormalised
    over an utterance's distinct hypotheses: sum_i P_i (W_i - mean W). Source: the N-best loss of arXiv 1712.01818.
    Alone it says nothing of what was not sampled, and probability leaks there (entropy rises): `ce_weight` holds it.
    """
    losses = []
    for group in group_ids.unique():
        rows = (group_ids == group) & distinct
        wrong = errors[rows].to(log_probs)
        losses.append((log_probs[rows].softmax(0) * (wrong - wrong.mean())).sum())
    return torch.stack(losses).mean()


def first_of_equal(ids: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """(n,) bool: whether no earlier sequence of the same group has the same tokens."""
    seen, first = set(), []
    for row, kept, group in zip(ids.tolist(), mask.tolist(), group_ids.tolist(), strict=True):
        key = (group, tuple(token for token, own in zip(row, kept, strict=True) if own))
        first.append(key not in seen)
        seen.add(key)
    return torch.tensor(first, device=ids.device)
