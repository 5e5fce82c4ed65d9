"""BigVGAN, the published vocoder: log-mel spectrogram to waveform by transposed convolutions and anti-aliased snakes.

Tensor names and shapes are those of the published checkpoints once their weight normalisation is folded in, which loading does.
Sources: BigVGAN (arXiv 2206.04658), v2 configuration of bigvgan_v2_44khz_128band_512x; Snake (arXiv 2006.08195).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BIGVGAN_44K = dict(
    num_mels=128, upsample_rates=[8, 4, 2, 2, 2, 2], upsample_kernel_sizes=[16, 8, 4, 4, 4, 4], upsample_initial_channel=1536,
    resblock="1", resblock_kernel_sizes=[3, 7, 11], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    activation="snakebeta", snake_logscale=True, use_bias_at_final=False, use_tanh_at_final=False)
BIGVGAN_16K = BIGVGAN_44K | dict(
    num_mels=80, upsample_rates=[4, 4, 2, 2, 2, 2], upsample_kernel_sizes=[8, 8, 4, 4, 4, 4], use_bias_at_final=True,
    use_tanh_at_final=True)
TAPS = 12  # of the anti-aliasing filter, whose rate is twice the signal's


def without_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict with every weight-norm pair replaced by the weight it stands for, g·v/|v| with the norm per first index.

    Pairs are named `weight_g`, `weight_v` or `parametrizations.weight.original0`, `…original1`; other tensors, and a tensor
    whose partner is missing, pass unchanged, so that strict loading names what is amiss.
    """
    plain = dict(state)
    for magnitude, direction in (("weight_g", "weight_v"),
                                 ("parametrizations.weight.original0", "parametrizations.weight.original1")):
        for name in [name for name in plain if name.endswith("." + magnitude)]:
            stem = name.removesuffix(magnitude)
            if stem + direction in plain:
                g, v = plain.pop(name), plain.pop(stem + direction)
                plain[stem + "weight"] = v * (g / torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True))
    return plain


def kaiser_sinc() -> Tensor:
    """The low-pass filter (1, 1, 12) of both resamplings: cutoff a quarter of the doubled rate, taps that sum to 1."""
    cutoff, half_width = 0.25, 0.3
    attenuation = 2.285 * (TAPS / 2 - 1) * math.pi * 4 * half_width + 7.95
    window = torch.kaiser_window(TAPS, periodic=False, beta=0.1102 * (attenuation - 8.7), dtype=torch.float64)
    time = torch.arange(TAPS, dtype=torch.float64) - (TAPS - 1) / 2
    taps = window * torch.sinc(2 * cutoff * time)
    return (taps / taps.sum()).float().reshape(1, 1, TAPS)


class Taps(nn.Module):
    """Holds a stored anti-aliasing filter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", kaiser_sinc())


class Snake(nn.Module):
    """x + sin²(a·x)/(b + 1e-9) per channel; a and b are alpha and beta, their exponentials on the log scale; without beta b = a."""

    def __init__(self, channels: int, *, has_beta: bool, log_scale: bool) -> None:
        super().__init__()
        start = torch.zeros if log_scale else torch.ones
        self.log_scale, self.alpha = log_scale, nn.Parameter(start(channels))
        self.beta = nn.Parameter(start(channels)) if has_beta else None

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha[:, None], (self.alpha if self.beta is None else self.beta)[:, None]
        if self.log_scale:
            alpha, beta = alpha.exp(), beta.exp()
        return x + torch.sin(x * alpha).square() / (beta + 1e-9)


class AntiAliased(nn.Module):
    """An activation at twice the sample rate, between low-pass filters, so that its harmonics do not fold back."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.upsample, self.downsample = act, Taps(), nn.ModuleDict({"lowpass": Taps()})

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        up, down = self.upsample.filter, self.downsample["lowpass"].filter
        x = F.pad(x, (5, 5), mode="replicate")
        x = 2 * F.conv_transpose1d(x, up.expand(channels, -1, -1), stride=2, groups=channels)[..., 15:-15]
        x = F.pad(self.act(x), (5, 6), mode="replicate")
        return F.conv1d(x, down.expand(channels, -1, -1), stride=2, groups=channels)


class AMPBlock(nn.Module):
    """Residual block of anti-aliased activations: for every dilation a dilated convolution, then a plain one.

    Where the input has a gradient, each pair is computed again in the backward pass: else 10 s of sound would keep 46 GB.
    """

    def __init__(self, channels: int, kernel: int, dilations: list[int], activation) -> None:
        super().__init__()

        def conv(dilation):
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)

        self.convs1 = nn.ModuleList(conv(dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(conv(1) for _ in dilations)
        self.activations = nn.ModuleList(activation(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        def pair(x: Tensor, conv1: nn.Module, conv2: nn.Module, act1: nn.Module, act2: nn.Module) -> Tensor:
            return x + conv2(act2(conv1(act1(x))))

        for layers in zip(self.convs1, self.convs2, self.activations[::2], self.activations[1::2], strict=True):
            kept = x.requires_grad and torch.is_grad_enabled()
            x = checkpoint(pair, x, *layers, use_reentrant=False, preserve_rng_state=False) if kept else pair(x, *layers)
        return x


class BigVGAN(nn.Module):
    """Log-mel (B, num_mels, frames) -> waveform (B, 1, frames·hop) within ±1; hop is the product of the upsampling rates.

    config: the keys of `BIGVGAN_44K`, as in a published config.json (keys of its training are passed over; a missing
    use_bias_at_final or use_tanh_at_final is true, as in version 1). `load_state_dict` takes all three spellings of the
    weights, see `without_weight_norm`. ValueError for a configuration that is not BigVGAN's.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        check_config(config)
        width, kernels = config["upsample_initial_channel"], config["resblock_kernel_sizes"]
        rates, dilations = config["upsample_rates"], config["resblock_dilation_sizes"]
        self.num_mels, self.hop, self.branches = config["num_mels"], math.prod(rates), len(kernels)
        self.tanh = config.get("use_tanh_at_final", True)

        def activation(channels):
            return AntiAliased(Snake(channels, has_beta=config["activation"] == "snakebeta", log_scale=config["snake_logscale"]))

        widths = [width // 2**stage for stage in range(len(rates) + 1)]
        self.conv_pre = nn.Conv1d(self.num_mels, width, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ModuleList([nn.ConvTranspose1d(before, after, kernel, rate, padding=(kernel - rate) // 2)])
            for before, after, kernel, rate in zip(widths[:-1], widths[1:], config["upsample_kernel_sizes"], rates, strict=True))
        self.resblocks = nn.ModuleList(
            AMPBlock(channels, kernel, dilation, activation)
            for channels in widths[1:] for kernel, dilation in zip(kernels, dilations, strict=True))
        self.activation_post = activation(widths[-1])
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3, bias=config.get("use_bias_at_final", True))
        self.register_load_state_dict_pre_hook(_fold_weight_norm)

    def forward(self, mel: Tensor) -> Tensor:
        """(B, num_mels, frames) -> (B, 1, frames·hop); ValueError for another number of bands."""
        if mel.dim() != 3 or mel.shape[1] != self.num_mels or not mel.shape[2]:
            raise ValueError(f"mel of shape {tuple(mel.shape)}: allowed (B, {self.num_mels} bands, frames); "
                             "transpose it, or use the vocoder of its mode")
        x = self.conv_pre(mel)
        for stage, (up,) in enumerate(self.ups):
            x = up(x)
            x = sum(block(x) for block in self.resblocks[stage * self.branches : (stage + 1) * self.branches]) / self.branches
        x = self.conv_post(self.activation_post(x))
        return torch.tanh(x) if self.tanh else x.clamp(-1.0, 1.0)


def _fold_weight_norm(module, state_dict, prefix, *_):
    plain = without_weight_norm(state_dict)
    state_dict.clear()
    state_dict.update(plain)


def check_config(config: dict) -> None:
    """ValueError, naming the key, where `config` is not that of a BigVGAN which is known here."""
    missing = sorted(BIGVGAN_44K.keys() - {"use_bias_at_final", "use_tanh_at_final"} - config.keys())
    if missing:
        raise ValueError(f"vocoder configuration without {', '.join(missing)}: give every key of BIGVGAN_44K")
    for key, allowed in (("resblock", ("1",)), ("activation", ("snakebeta", "snake"))):
        if config[key] not in allowed:
            raise ValueError(f"{key}={config[key]!r}: allowed {', '.join(map(repr, allowed))}, as in the published configurations")
    rates, kernels = config["upsample_rates"], config["upsample_kernel_sizes"]
    if len(rates) != len(kernels) or any(kernel < rate or (kernel - rate) % 2 for rate, kernel in zip(rates, kernels, strict=True)):
        raise ValueError(f"upsample_rates={rates}, upsample_kernel_sizes={kernels}: a kernel a rate, larger by an even number")
    if len(config["resblock_kernel_sizes"]) != len(config["resblock_dilation_sizes"]):
        raise ValueError("resblock_kernel_sizes and resblock_dilation_sizes differ in length: give a list of dilations a kernel")
    if config["upsample_initial_channel"] % 2 ** len(rates):
        raise ValueError(f"upsample_initial_channel={config['upsample_initial_channel']}: halved {len(rates)} times, so a multiple "
                         f"of {2 ** len(rates)} is allowed")
