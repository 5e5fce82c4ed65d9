"""Building blocks of the flow transformer: channel-last convolution, gated MLPs, rotary attention, adaptive blocks.

Every module has the parameter names and shapes of the published checkpoints; only the way of computing is ours.
Tensors are (B, sequence, channels). Source: the published Resonate / MMAudio network (arXiv 2603.11661, arXiv
2412.15322).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_LATENT_POSITIONS = 2048
SHORT_SEQUENCE = 256


def _spread(x: Tensor, kernel: int) -> Tensor:
    """(B, N, C) -> (B, N, kernel*C): each frame beside its zero-padded neighbours, out[n, tap] = x[n + tap -
    kernel//2].
    """
    (batch, frames, channels), pad = x.shape, kernel // 2
    out = x.new_empty(batch, frames, kernel, channels)
    for tap in range(kernel):
        first, last = max(0, min(frames, pad - tap)), max(0, min(frames, frames + pad - tap))
        out[:, :first, tap] = 0
        out[:, first:last, tap] = x[:, first + tap - pad : last + tap - pad] if first < last else 0
        out[:, max(first, last) :, tap] = 0
    return out.flatten(2)


def _fold(z: Tensor, kernel: int) -> Tensor:
    """(B, N, kernel*C) -> (B, N, C), the adjoint of `_spread`: out[m] = sum over taps of z[m - tap + kernel//2, tap].
    """
    z, pad = z.unflatten(2, (kernel, -1)), kernel // 2
    frames, out = z.shape[1], z[:, :, pad].clone()
    for tap in range(kernel):
        first, last = max(0, pad - tap), min(frames, frames + pad - tap)
        if tap != pad and first < last:
            out[:, first + tap - pad : last + tap - pad] += z[:, first:last, tap]
    return out


class _Spread(torch.autograd.Function):
    """`_spread` with `_fold` as its gradient; autograd's own would zero-fill and add a whole tensor per tap."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: int) -> Tensor:
        ctx.kernel = kernel
        return _spread(x, kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _fold(grad, ctx.kernel), None


class _Fold(torch.autograd.Function):
    """`_fold` with `_spread` as its gradient."""

    @staticmethod
    def forward(ctx, z: Tensor, kernel: int) -> Tensor:
        ctx.kernel = kernel
        return _fold(z, kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _spread(grad, ctx.kernel), None


def _columns(x: Tensor, kernel: int) -> Tensor:
    """`_spread` in the dtype of the matrix product that follows, so that the copies are half as large under autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Spread.apply(x, kernel)


def _by_columns(columns: Tensor, conv: nn.Conv1d) -> Tensor:
    """The convolution as one matrix product over `_columns`; equal to Conv1d up to rounding."""
    weight = conv.weight.transpose(1, 2).reshape(conv.out_channels, -1)
    return F.linear(columns, weight, conv.bias)


class ChannelLastConv(nn.Conv1d):
    """Conv1d over axis 1 of (B, N, C), stride 1, zero padding that keeps N; weight (out, in, kernel).

    On a CPU it is one matrix product over copied neighbours, or, where the output is much narrower, over the frames
    with the taps summed afterwards: a training step of width 192 in bfloat16 takes 7 to 10 % less time than with
    `conv1d`. Elsewhere `conv1d`, which needs no copies.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel_size[0]
        if x.device.type != "cpu":
            return super().forward(x.transpose(1, 2)).transpose(1, 2)
        if self.bias is None and self.in_channels >= 2 * self.out_channels:
            taps = self.weight.flip(2).permute(2, 0, 1).reshape(-1, self.in_channels)
            return _Fold.apply(F.linear(x, taps), kernel)
        return _by_columns(_columns(x, kernel), self)


def gated_width(hidden: int) -> int:
    """Width inside a gated MLP: two thirds of `hidden`, rounded up to a multiple of 256 (448*4 = 1792 -> 1280)."""
    return -(-int(2 * hidden / 3) // 256) * 256


class MLP(nn.Module):
    """Gated MLP w2(silu(w1 x) * w3 x) without biases, per token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = gated_width(hidden)
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class ConvMLP(nn.Module):
    """Gated MLP whose three maps are channel-last convolutions of one kernel size, without biases."""

    def __init__(self, dim: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        width = gated_width(hidden)
        self.w1 = ChannelLastConv(dim, width, kernel_size, bias=False)
        self.w2 = ChannelLastConv(width, dim, kernel_size, bias=False)
        self.w3 = ChannelLastConv(dim, width, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.w2(F.silu(self.w1(x)) * self.w3(x))
        columns = _columns(x, self.w1.kernel_size[0])  # shared by w1 and w3
        return self.w2(F.silu(_by_columns(columns, self.w1)) * _by_columns(columns, self.w3))


class TimestepEmbedder(nn.Module):
    """t (B,) in [0, 1] -> (B, dim), always in float32: neighbouring times differ by less than bfloat16 resolves.

    The 256 sinusoids see t itself, not 1000 t, cosines first.
    """

    def __init__(self, dim: int, sinusoids: int = 256) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.mlp = nn.Sequential(nn.Linear(sinusoids, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(timestep_sinusoid(t, self.sinusoids).to(self.mlp[0].weight.dtype))


def timestep_sinusoid(t: Tensor, dim: int = 256) -> Tensor:
    """t (B,) -> (B, dim) float32: [cos(t f_k), sin(t f_k)], f_k = 10000^(-2k/dim), k < dim/2."""
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=t.device, dtype=torch.float32) / dim)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=8)
def rope_table(length: int, dim: int, device: torch.device) -> Tensor:
    """Rotations exp(i p 10000^(-2i/dim)), complex64 (length, dim/2), positions p from 0.

    Not a buffer, so casting a network to bfloat16 leaves it exact (the published code rounds it).
    """
    with torch.inference_mode(False):
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(device)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the adjacent pairs (2i, 2i+1) of x (..., N, ..., d) float32 by a complex table that broadcasts to (...,
    d/2).
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2)


class RMSNorm(nn.Module):
    """Holds a head-dim weight; `SelfAttention.qkv_heads` applies it to q and k at once."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class _NormRotate(torch.autograd.Function):
    """RMS norm over the last dim (eps 1.19e-7), weight, rotation; float32 inside, the dtype of x outside.

    x (B, N, 2, H, d) holds q and k, weight (2, 1, d), table complex (N, 1, 1, d/2) or None. The gradient is written
    out because autograd's chain makes more passes over the activations: 10 to 17 % of a training step on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, table: Tensor | None) -> Tensor:
        full = x.float()
        scale = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = torch.rsqrt(scale.square() / x.shape[-1] + torch.finfo(torch.float32).eps)
        ctx.save_for_backward(x, scale, weight, table)
        out = full * scale * weight.float()
        return (out if table is None else apply_rope(out, table)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight, table = ctx.saved_tensors
        grad = grad.float() if table is None else apply_rope(grad.float(), table.conj())
        normed = x.float() * scale
        grad_weight = (grad * normed).sum((0, 1)).sum(1, keepdim=True)
        grad = grad * weight.float()
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.shape[-1]
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class SelfAttention(nn.Module):
    """Projection to heads with normalised, rotated queries and keys; the attention itself may span two streams.

    The published `qkv` output is laid out (head, dim, q|k|v) with q|k|v fastest. Here the weight's rows are reordered
    on the fly, which is far smaller work than striding through the activations.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def qkv_heads(self, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D) -> q, k, v, each (B, N, H, d); q and k RMS-normalised and rotated in float32."""
        heads, dim = self.num_heads, self.head_dim
        weight = self.qkv.weight.view(heads, dim, 3, -1).permute(2, 0, 1, 3).reshape(3 * heads * dim, -1)
        bias = self.qkv.bias.view(heads, dim, 3).permute(2, 0, 1).reshape(-1)
        qk, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, dim)).split((2, 1), dim=2)
        norms = torch.stack([self.q_norm.weight, self.k_norm.weight])[:, None]
        q, k = _NormRotate.apply(qk, norms, None if table is None else table[:, None, None]).unbind(2)
        return q, k, v.squeeze(2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked scaled dot-product attention over (B, N, H, d) -> (B, N, H*d).

    Short sequences on a CPU are two batched products: the fused kernel's backward takes 3 to 6 times as long
    there (31 to 108 positions, bfloat16).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and k.shape[2] <= SHORT_SEQUENCE:
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1, dtype=torch.float32).to(v.dtype)
        out = weights @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine parameters (eps 1e-5), then x*(1+scale) + shift; shift, scale (B, 1, D)."""
    x = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(shift.to(x.dtype), x, (1 + scale).to(x.dtype))


class Block(nn.Module):
    """One stream's adaptive transformer block (the published MMDiT single block).

    kernel_size 3 gives the latent form (convolutions), None the text form (linear maps). `pre_only` keeps only what
    the other stream's attention needs.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, kernel_size: int | None, pre_only: bool = False) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.attn = SelfAttention(dim, num_heads)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if pre_only else 6) * dim))
        if pre_only:
            return
        if kernel_size is None:
            self.linear1, self.ffn = nn.Linear(dim, dim), MLP(dim, hidden)
        else:
            self.linear1, self.ffn = ChannelLastConv(dim, dim, kernel_size), ConvMLP(dim, hidden, kernel_size)

    def modulation(self, c_act: Tensor) -> tuple[Tensor, ...]:
        """silu(c) (B, 1, D) -> (shift, scale[, gate, shift_mlp, scale_mlp, gate_mlp]), each (B, 1, D).

        silu(c) is the same for every block, so the caller computes it once.
        """
        return self.adaLN_modulation[1](c_act).chunk(2 if self.pre_only else 6, dim=-1)

    def pre(self, x: Tensor, c_act: Tensor, table: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns ((q, k, v), what `post` needs of the modulation)."""
        shift, scale, *rest = self.modulation(c_act)
        return self.attn.qkv_heads(modulated_norm(x, shift, scale), table), tuple(rest)

    def post(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        """Add the attention and MLP branches; x, attended (B, N, D)."""
        gate, shift_mlp, scale_mlp, gate_mlp = (m.to(x.dtype) for m in rest)
        x = torch.addcmul(x, gate, self.linear1(attended).to(x.dtype))
        return torch.addcmul(x, gate_mlp, self.ffn(modulated_norm(x, shift_mlp, scale_mlp)).to(x.dtype))

    def forward(self, x: Tensor, c_act: Tensor, table: Tensor | None) -> Tensor:
        heads, rest = self.pre(x, c_act, table)
        return self.post(x, attend(*heads), rest)


class JointBlock(nn.Module):
    """A latent and a text stream with one attention over both, latent first."""

    def __init__(self, dim: int, num_heads: int, hidden: int, pre_only: bool = False) -> None:
        super().__init__()
        self.pre_only = pre_only
        self.latent_block = Block(dim, num_heads, hidden, kernel_size=3)
        self.text_block = Block(dim, num_heads, hidden, kernel_size=None, pre_only=pre_only)

    def forward(self, latent: Tensor, text: Tensor, c_act: Tensor, tables: tuple) -> tuple[Tensor, Tensor]:
        """latent (B, N, D), text (B, L, D) -> both; the text passes unchanged where the block is the last one."""
        heads, rest = self.latent_block.pre(latent, c_act, tables[0])
        text_heads, text_rest = self.text_block.pre(text, c_act, tables[1])
        frames = latent.shape[1]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(heads, text_heads, strict=True))
        if self.pre_only:  # the text's own attention output would be thrown away
            return self.latent_block.post(latent, attend(q[:, :frames], k, v), rest), text
        heard, read = attend(q, k, v).split((frames, text.shape[1]), dim=1)
        return self.latent_block.post(latent, heard, rest), self.text_block.post(text, read, text_rest)


class FinalBlock(nn.Module):
    """Adaptive norm and a convolution of kernel 7 to the latent channels."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.conv = ChannelLastConv(dim, out_dim, 7)

    def forward(self, x: Tensor, c_act: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](c_act).chunk(2, dim=-1)
        return self.conv(modulated_norm(x, shift, scale))
