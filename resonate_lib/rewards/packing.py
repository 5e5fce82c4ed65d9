"""Several questions about one clip in one row: their tokens as a tree.

The template puts the clip first, so everything up to its end is the same for every question about it, and questions of one form
begin with the same words. What they share stands in the row once: a token attends to its ancestors alone and counts its
position from the root. That equals separate sequences exactly and costs less than half (a test checks it against the model's
own forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LENGTHS = 32  # rows of any length would need a kernel for each on a CPU, which keeps them all: slower by 1.1, and gigabytes


class Tree:
    """Token sequences that begin with the same `trunk` and share whatever else they begin with. ids: every token once;
    parents[i] < i is the place of the token before it."""

    def __init__(self, trunk: Sequence[int]):
        self.ids, self.parents, self.trunk = list(trunk), list(range(-1, len(trunk) - 1)), len(trunk)
        self._after: dict[tuple[int, int], int] = {}

    def add(self, tokens: Sequence[int]) -> list[int]:
        """The places of a sequence's tokens after the trunk; those that are new are appended."""
        at, places = self.trunk - 1, []
        for token in tokens:
            if (at, token) not in self._after:
                self._after[at, token] = len(self.ids)
                self.ids.append(token)
                self.parents.append(at)
            at = self._after[at, token]
            places.append(at)
        return places


@dataclass
class Packed:
    """Trees as rows of one batch. ids, positions (B, L) and mask (B, 1, L, L) bool feed the language model; answers are read
    at rows, columns (A,)."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor


def pack(trees: Sequence[Tree], pad: int, places: Sequence[tuple[int, int]]) -> Packed:
    """Trees of one trunk, filled up with the token `pad` to a multiple of LENGTHS. places: (row, place in its tree) of every
    answer."""
    length, trunk = -(-max(len(tree.ids) for tree in trees) // LENGTHS) * LENGTHS, trees[0].trunk
    ids = np.full((len(trees), length), pad)
    positions = np.zeros((len(trees), length), dtype=np.int64)
    positions[:, :trunk] = np.arange(trunk)
    mask = np.zeros((len(trees), length, length), dtype=bool)
    mask[:, :trunk, :trunk] = np.tri(trunk, dtype=bool)
    mask[:, trunk:, :trunk] = True  # also for padding, so that no row of the mask is empty
    mask |= np.eye(length, dtype=bool)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = tree.ids
        sees, depth = mask[row], positions[row]
        for place, parent in enumerate(tree.parents[trunk:], start=trunk):
            depth[place] = depth[parent] + 1
            if parent >= trunk:
                sees[place, trunk : parent + 1] = sees[parent, trunk : parent + 1]
    rows, columns = torch.tensor(list(places)).T
    return Packed(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(mask)[:, None], rows, columns)


def hidden_states(model, packed: Packed, heard: Tensor, start: int) -> Tensor:
    """Hidden states (A, width) at the answers' places of a Qwen2-Audio-class model; heard (B, audio tokens, width) is what
    its audio tower gives, `start` the place of the first of them in the trunk."""
    core, device = model.model, heard.device
    sound = core.multi_modal_projector(heard)
    embedded = core.get_input_embeddings()(packed.ids.to(device)).to(sound.dtype)
    embedded = torch.cat([embedded[:, :start], sound, embedded[:, start + sound.shape[1] :]], dim=1)
    hidden = core.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    return hidden[packed.rows.to(device), packed.columns.to(device)]
