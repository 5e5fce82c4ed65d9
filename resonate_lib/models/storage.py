"""How a generator's weights lie on disk: as they are, as float16, or as 8-bit whole numbers with a scale for each row.

Reading gives float32 whatever they were stored as.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from resonate_lib.models.pretrained import read_weights

BITS = (32, 16, 8)
SCALE = ".scale"  # name of a matrix's scales: its own and this
STEPS = 127  # the largest whole number; -128 is not used, so that a row and its negative are stored alike


def packed(state: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """The float tensors of a state dict as they are stored, on the CPU.

    32: unchanged; 16: float16; 8: matrices and convolutions as int8, row by row of the output, times `<name>.scale` (rows,)
    float32, the row's largest magnitude over 127, so that no weight is off by more than half a step; what has one dimension
    (or others of length 1) as float16. ValueError for other bits.
    """
    if bits not in BITS:
        raise ValueError(f"bits={bits}: allowed are {', '.join(map(str, BITS))}")
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if bits == 8 and tensor.numel() > max(tensor.shape, default=1):
            stored[name], stored[name + SCALE] = _rows(tensor.float())
        else:
            stored[name] = tensor if bits == 32 else tensor.half()
    return stored


def _rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """int8 like tensor (rows, ...), and the scales (rows,) that give it back."""
    scale = tensor.flatten(1).abs().amax(1) / STEPS
    column = torch.where(scale > 0, scale, 1.0).reshape(-1, *[1] * (tensor.dim() - 1))
    return (tensor / column).round().to(torch.int8), scale


def read(path: str | Path) -> dict[str, Tensor]:
    """The float32 tensors of a file that holds what `packed` made, or plain weights. ValueError in one line where it is damaged."""
    stored, state = read_weights(path), {}
    rows = {name for name, tensor in stored.items() if tensor.dtype == torch.int8}
    for name, tensor in stored.items():
        if name in rows:
            scale = stored.get(name + SCALE)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise ValueError(f"{path} is damaged: {name} has {len(tensor)} rows of 8 bits, but no scale for each; get it again")
            state[name] = tensor * scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
        elif name.removesuffix(SCALE) not in rows:
            state[name] = tensor.float()
    return state
