"""The published autoencoder between log-mel spectrograms and latents: one-dimensional, of magnitude-preserving layers.

Tensor names and shapes are those of its checkpoints, so they load with `load_state_dict(strict=True)`; call
`remove_weight_norm()` once after. The mel front end and the vocoder are in `codec.py` and `bigvgan.py`.
Sources: MMAudio (arXiv 2412.15322); EDM2 (arXiv 2312.02696) for the layers.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"44k": dict(data_dim=128, embed_dim=40, hidden_dim=512), "16k": dict(data_dim=80, embed_dim=20, hidden_dim=384)}
EPS = 1e-4
RESIDUAL_SHARE = 0.3
LIMIT = 256.0  # activations are clamped to it after every block


def pixel_norm(x: Tensor) -> Tensor:
    """(B, channels, …) divided by the root mean square over the channels plus 1e-4."""
    return x / (EPS + torch.linalg.vector_norm(x, dim=1, keepdim=True) * x.shape[1] ** -0.5)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the variance of standard normal input."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, share: float = RESIDUAL_SHARE) -> Tensor:
    """(1 - share)·a + share·b, scaled to keep the magnitude of uncorrelated inputs."""
    return torch.lerp(a, b, share) / ((1 - share) ** 2 + share**2) ** 0.5


def posterior(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (B, C, N), of the Gaussian whose (B, 2C, N) parameters hold mean and log variance.

    The log variance is clamped to [-30, 20].
    """
    mean, log_variance = parameters.chunk(2, dim=1)
    return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))


class MPConv(nn.Module):
    """Convolution without bias, stride 1, zero padding to the same length, over filters of norm 1.

    A checkpoint's filters have norm sqrt(in_dim·kernel) instead; `normalize` brings them to 1.
    """

    def __init__(self, in_dim: int, out_dim: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim, kernel))

    def filter_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=(1, 2), keepdim=True)

    @torch.no_grad()
    def normalize(self) -> None:
        """Filters to norm 1 (less 1e-4 parts of sqrt(in_dim·kernel)); where all of them have it already, nothing changes."""
        norm, root = self.filter_norms(), self.weight[0].numel() ** 0.5
        done = ((norm - 1).abs() < 0.01).all()  # not an `if`: a layer on the meta device has no values to branch on
        self.weight.copy_(torch.where(done, self.weight, self.weight / (EPS + norm / root) / root))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, padding=self.weight.shape[-1] // 2)


class ResBlock(nn.Module):
    """Two convolutions beside the normalised input, which a 1x1 convolution widens where the widths differ."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv1 = MPConv(in_dim, out_dim, 3)
        self.conv2 = MPConv(out_dim, out_dim, 3)
        self.nin_shortcut = MPConv(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = pixel_norm(x)
        h = self.conv2(mp_silu(self.conv1(mp_silu(x))))
        return mp_sum(self.nin_shortcut(x), h)


class Attention(nn.Module):
    """Self-attention of one head over the frames, its queries, keys and values normalised over the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = MPConv(dim, 3 * dim, 1)
        self.proj_out = MPConv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = pixel_norm(self.qkv(x).unflatten(1, (-1, 3)))  # (B, dim, 3, N): query, key, value are neighbours
        h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1))
        return mp_sum(x, self.proj_out(h.transpose(1, 2)))


class Downsample(nn.Module):
    """Half as many frames by averaging pairs; an odd last frame is dropped."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = MPConv(dim, dim, 1), MPConv(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))


class Upsample(nn.Module):
    """Twice as many frames by repeating each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = MPConv(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=-1))


def level(in_dim: int, out_dim: int, blocks: int, **resample: nn.Module) -> nn.ModuleDict:
    """`blocks` residual blocks, the first of which changes the width, and perhaps a change of the frame rate."""
    widths = [in_dim, *[out_dim] * blocks]
    return nn.ModuleDict({"block": nn.ModuleList(map(ResBlock, widths[:-1], widths[1:])), **resample})


def run_blocks(blocks, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x).clamp(-LIMIT, LIMIT)
    return x


class Middle(nn.Module):
    """Block, attention, block at the widest level."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = ResBlock(dim, dim), Attention(dim), ResBlock(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x))).clamp(-LIMIT, LIMIT)


class Encoder(nn.Module):
    """(B, data_dim, frames) -> (B, 2·embed_dim, frames // 2)."""

    def __init__(self, data_dim: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        dim = hidden_dim
        self.conv_in = MPConv(data_dim, dim, 3)
        self.down = nn.ModuleList(
            [level(dim, dim, 2, downsample=Downsample(dim)), level(dim, 2 * dim, 2), level(2 * dim, 4 * dim, 2)])
        self.mid = Middle(4 * dim)
        self.conv_out = MPConv(4 * dim, 2 * embed_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for part in self.down:
            h = run_blocks(part["block"], h)
            h = part["downsample"](h) if "downsample" in part else h
        return self.conv_out(mp_silu(self.mid(h))) * (1 + self.learnable_gain)


class Decoder(nn.Module):
    """(B, embed_dim, frames) -> (B, data_dim, 2·frames); the levels run from the widest, the last of the list, down."""

    def __init__(self, data_dim: int, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        dim = hidden_dim
        self.conv_in = MPConv(embed_dim, 4 * dim, 3)
        self.mid = Middle(4 * dim)
        self.up = nn.ModuleList(
            [level(2 * dim, dim, 3), level(4 * dim, 2 * dim, 3, upsample=Upsample(2 * dim)), level(4 * dim, 4 * dim, 3)])
        self.conv_out = MPConv(dim, data_dim, 3)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for part in reversed(self.up):
            h = run_blocks(part["block"], h)
            h = part["upsample"](h) if "upsample" in part else h
        return self.conv_out(mp_silu(h)) * (1 + self.learnable_gain)


class MelVAE(nn.Module):
    """Log-mel (B, bands, frames) <-> latents (B, embed_dim, frames // 2), the layout of the published checkpoints.

    mode: "44k" (128 bands, 40 numbers a latent frame, 305 M parameters) or "16k" (80, 20, 172 M); data_dim (bands), embed_dim and
    hidden_dim (a quarter of the widest level) replace its sizes. The mel's mean and deviation per band are stored in the
    checkpoint; until then they are the published ones for 80 and 128 bands, and 0 and 1 for any other number.
    ValueError for another mode.
    """

    def __init__(self, mode: str = "44k", *, data_dim: int | None = None, embed_dim: int | None = None,
                 hidden_dim: int | None = None) -> None:
        super().__init__()
        if mode not in SIZES:
            raise ValueError(f"mode={mode!r}: allowed {sorted(SIZES)}; it names the sample rate of the published autoencoder")
        given = dict(data_dim=data_dim, embed_dim=embed_dim, hidden_dim=hidden_dim)
        sizes = {name: SIZES[mode][name] if value is None else value for name, value in given.items()}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least 1 is allowed; leave it out for the published {SIZES[mode][name]}")
        self.data_dim, self.embed_dim, self.hidden_dim = sizes.values()
        statistics = json.loads(Path(__file__).with_name("mel_statistics.json").read_text()).get(str(self.data_dim), {})
        for name, neutral in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(statistics.get(name, [neutral] * self.data_dim))
            self.register_buffer(f"data_{name}", values.reshape(1, -1, 1))
        self.encoder = Encoder(**sizes)
        self.decoder = Decoder(**sizes)

    def remove_weight_norm(self) -> "MelVAE":
        """Normalise the weights in place, once after a checkpoint was loaded; again, or on weights saved since, it does nothing.

        Returns itself. Each filter w over K = in_dim·kernel numbers becomes w / (1e-4 + |w|/sqrt(K)) / sqrt(K).
        """
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalize()
        return self

    def encode(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Log-mel (B, bands, frames) -> mean and standard deviation of the latents, each (B, embed_dim, frames // 2).

        ValueError for another shape, fewer than 2 frames included; RuntimeError before `remove_weight_norm`.
        """
        self._check("mel", mel, self.data_dim, "bands", 2, self.encoder)
        return posterior(self.encoder((mel - self.data_mean) / self.data_std))

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, embed_dim, frames) -> log-mel (B, bands, 2·frames). Errors as for `encode`."""
        self._check("latent", latent, self.embed_dim, "channels", 1, self.decoder)
        return self.decoder(latent) * self.data_std + self.data_mean

    @staticmethod
    def _check(name, x, channels, unit, shortest, half):
        if x.dim() != 3 or x.shape[1] != channels or x.shape[2] < shortest:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: allowed (B, {channels} {unit}, at least {shortest} frames); "
                             f"transpose it, or use the autoencoder of its mode")
        if half.conv_in.filter_norms().max() > 1.01:
            raise RuntimeError("weights as a checkpoint stores them, not normalised: call remove_weight_norm() once after loading")
