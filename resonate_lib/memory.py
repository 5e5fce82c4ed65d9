"""How much memory a training takes, worked out before anything starts: a plan of rows, its table, and a check that it fits.

Nothing is allocated: networks are built and run as shapes only (torch's fake tensors), and what their operations would keep
alive is counted. Sizes are bytes; GB are 10^9 bytes. Other models on the device are given by their size (`held`).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resonate_lib import flow, online, training
from resonate_lib.config import Config, DPOConfig, GRPOConfig, NFTConfig, PretrainConfig
from resonate_lib.models import layers
from resonate_lib.models.flux_audio import Condition, FluxAudio

ALLOWANCE = 1_000_000_000  # of a GPU: driver, libraries and their workspaces; an allowance, not a measurement


@dataclass(frozen=True)
class Row:
    """One part of a plan: its bytes, when it is there ("" always, else the name of a phase), and which knobs shrink it."""

    part: str
    bytes: int
    phase: str = ""
    knobs: str = ""


@dataclass(frozen=True)
class Use:
    """Bytes of a network: parameters; trained ones; kept from a forward to its backward; at most in an update, the gradients of
    weights apart; at most while it samples."""

    weights: int
    trained: int
    kept: int
    update: int
    sampling: int


class Live(TorchDispatchMode):
    """Within it, `now` and `peak` are the bytes of storages that torch operations made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def start(self) -> int:
        """Forget the peak so far; returns `now`."""
        self.peak = self.now
        return self.now


@contextlib.contextmanager
def _autocast(precision: str, device: str) -> Iterator[None]:
    """`training.autocast`, which torch refuses for a GPU that is not there."""
    if isinstance(training.autocast(precision, "cpu" if device == "cuda" and precision == "bf16" else device), contextlib.nullcontext):
        yield
        return
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`layers.attend` by the kernels that a GPU takes: flash for bfloat16, memory-efficient for float32."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.dtype == torch.float32:
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def _shapes_only(device: str) -> Iterator[None]:
    """Fake tensors on `device`, which need not exist; attention by the GPU's kernels there. Cached tables do not leak."""
    attend = layers.attend
    layers.rope_table.cache_clear()
    layers.attend = attend if device == "cpu" else _fused_attention
    try:
        with FakeTensorMode(), torch.device(device):
            yield
    finally:
        layers.attend = attend
        layers.rope_table.cache_clear()
