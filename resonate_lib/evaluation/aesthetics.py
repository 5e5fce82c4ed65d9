"""AudioBox-Aesthetics by tensors: four scores of a clip, each about 1 to 10, that need neither its prompt nor a reference.

WavLM (the class of transformers), for each axis a learned mix of its layers, their mean over time, and a small head. The
official files are read with every tensor used; the official package, which takes paths, is not needed.
Source: Meta Audiobox Aesthetics (arXiv 2502.05139), hub `facebook/audiobox-aesthetics` (weights CC-BY 4.0).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from resonate_lib.models.pretrained import locate, read_content
from resonate_lib.rewards.laion import check_audio, exact_float32

AXES = {"CE": "content enjoyment", "CU": "content usefulness", "PC": "production complexity", "PQ": "production quality"}
SAMPLE_RATE = 16000  # Hz
WINDOW = 160_000  # samples, 10 s
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # of WavLM's convolutions: 50 frames a second
# What the official file calls a tensor, and what transformers calls it; applied in this order.
RENAMES = (
    (r"^(model\.)?wavlm_model\.", "wavlm."),
    (r"^model\.", ""),
    (r"^wavlm\.layer_norm\.", "wavlm.feature_projection.layer_norm."),
    (r"\.post_extract_proj\.", ".feature_projection.projection."),
    (r"\.mask_emb$", ".masked_spec_embed"),
    (r"(\.conv_layers\.\d+)\.0\.", r"\1.conv."),
    (r"(\.conv_layers\.0)\.2\.", r"\1.layer_norm."),
    (r"\.pos_conv\.0\.weight_g$", ".pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"\.pos_conv\.0\.weight_v$", ".pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"\.pos_conv\.0\.", ".pos_conv_embed.conv."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.self_attn\.grep_a$", ".self_attn.gru_rel_pos_const"),
    (r"\.self_attn\.grep_linear\.", ".self_attn.gru_rel_pos_linear."),
    (r"\.self_attn\.relative_attention_bias\.", ".self_attn.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
)


def rename(name: str) -> str:
    """The name in `Predictor` of a tensor of the official file."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def wavlm_config(state: dict[str, Tensor]):
    """The configuration of the WavLM whose (renamed) weights these are: the sizes are read from them."""
    from transformers import WavLMConfig

    layer, convolution = "wavlm.encoder.layers.", "wavlm.feature_extractor.conv_layers."
    kernels = [state[f"{convolution}{i}.conv.weight"] for i in range(len(STRIDES))]
    positions = state["wavlm.encoder.pos_conv_embed.conv.parametrizations.weight.original1"]
    buckets, heads = state[f"{layer}0.attention.rel_attn_embed.weight"].shape
    return WavLMConfig(
        hidden_size=positions.shape[0],
        num_hidden_layers=len({name.split(".")[3] for name in state if name.startswith(layer)}),
        num_attention_heads=heads,
        intermediate_size=state[f"{layer}0.feed_forward.intermediate_dense.weight"].shape[0],
        conv_dim=[kernel.shape[0] for kernel in kernels],
        conv_kernel=[kernel.shape[2] for kernel in kernels],
        conv_stride=list(STRIDES),
        num_conv_pos_embeddings=positions.shape[2],
        num_conv_pos_embedding_groups=positions.shape[0] // positions.shape[1],
        num_buckets=buckets,
    )


class Predictor(nn.Module):
    """The network: windows of 10 s (N, 160000) -> four normalised scores (N, 4) in the order of `AXES`.

    settings: of the official configuration, what shapes the heads: proj_num_layer, proj_ln, proj_dropout, normalize_embed.
    """

    def __init__(self, config, settings: dict):
        super().__init__()
        from transformers import WavLMModel

        self.wavlm, self.settings = WavLMModel(config), settings
        self.layer_weights = nn.ParameterDict({axis: torch.ones(config.num_hidden_layers + 1) for axis in AXES})
        self.proj_layer = nn.ModuleDict({axis: self._head(config.hidden_size) for axis in AXES})

    def _head(self, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(self.settings["proj_num_layer"] - 1):
            layers += [nn.Linear(width, width)]
            layers += [nn.LayerNorm(width)] if self.settings["proj_ln"] else []
            layers += [nn.GELU()]
            layers += [nn.Identity()] if self.settings["proj_dropout"] else []  # it counts in the tensors' names
        return nn.Sequential(*layers, nn.Linear(width, 1))

    def states(self, windows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states (layers + 1, N, frames, width) and which frames hold sound (N, frames).

        Not WavLMModel.forward: it counts a frame as sound only where its whole receptive field is, the official code
        where any of its 20 ms is.
        """
        features = self.wavlm.feature_extractor(windows).transpose(1, 2)
        step = windows.shape[1] // features.shape[1]
        mask = torch.arange(features.shape[1], device=windows.device) * step < lengths[:, None]
        encoder = self.wavlm.encoder
        x = self.wavlm.feature_projection(features)[0].masked_fill(~mask[..., None], 0.0)
        x = encoder.layer_norm(x + encoder.pos_conv_embed(x))
        states, bias = [x], None
        with warnings.catch_warnings():  # torch would rather see one kind of mask; transformers passes two
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            for layer in encoder.layers:
                x, bias = layer(x, attention_mask=mask, position_bias=bias)
                states.append(x)
        return torch.stack(states), mask

    def forward(self, windows: Tensor, lengths: Tensor) -> Tensor:
        """lengths (N,): how many samples of each window are sound; the rest is silence."""
        states, mask = self.states(windows, lengths)
        means = (states * mask[..., None]).sum(2) / mask.sum(1)[:, None]
        scores = []
        for axis in AXES:
            x = torch.einsum("l,lnc->nc", self.layer_weights[axis].softmax(0), means)
            x = F.normalize(x, dim=-1) if self.settings["normalize_embed"] else x
            scores.append(self.proj_layer[axis](x))
        return torch.cat(scores, dim=1)


def read_official(source: str | Path) -> tuple[dict[str, Tensor], dict, dict, Path]:
    """The weights under `Predictor`'s names, the settings, each axis' mean and std of the raters, and the file they are in.

    source: the hub's `model.safetensors` (with config.json beside it), its folder or the hub id, as `pretrained.locate` takes
    them, or the file `checkpoint.pt`. Raises FileNotFoundError or ValueError.
    """
    path = locate("aesthetics", source).path
    content = read_content(path)
    if path.suffix == ".safetensors":
        config = path.with_name("config.json")
        if not config.is_file():
            raise FileNotFoundError(f"{config}: no such file; copy config.json from the repository of the weights")
        settings = json.loads(config.read_text())
        state, transform = content, settings.get("target_transform")
    else:
        state, settings, transform = (content.get(key) for key in ("state_dict", "model_cfg", "target_transform"))
    if not state or settings is None or not set(AXES) <= set(transform or ()):
        raise ValueError(f"{path}: no weights with settings and target_transform of {list(AXES)}; name the official file")
    return {rename(name): tensor for name, tensor in state.items()}, dict(settings), transform, path


def build_predictor(state: dict[str, Tensor], settings: dict) -> Predictor:
    """The network with these weights, every one of them used; float32, frozen. ValueError where they do not fit."""
    settings = {"proj_num_layer": 1, "proj_ln": False, "proj_dropout": 0, "normalize_embed": True} | settings
    fixed = {"proj_act_fn": "gelu", "use_weighted_layer_sum": True, "output_dim": 1}
    other = {key: settings[key] for key, value in fixed.items() if settings.get(key, value) != value}
    if other:
        raise ValueError(f"settings {other}: only {fixed} can be built, as in the published model")
    try:
        with torch.random.fork_rng(devices=[]):
            model = Predictor(wavlm_config(state), settings)
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights do not fit the model ({reason} ...); use the official file") from None
    return model.float().eval().requires_grad_(False)


class Aesthetics:
    """The four scores of clips: content enjoyment CE, content usefulness CU, production complexity PC, production
    quality PQ."""

    def __init__(self, model: Predictor, transform: dict, *, batch_size: int = 16):
        self.model, self.batch_size = model, batch_size
        self.mean = torch.tensor([transform[axis]["mean"] for axis in AXES])
        self.std = torch.tensor([transform[axis]["std"] for axis in AXES])

    @classmethod
    def load(cls, source: str | Path, device: str | None = None, *, batch_size: int = 16) -> Aesthetics:
        """Reads the official files: see `read_official` for source. device: default a GPU if there is one.
        batch_size: windows of 10 s in one forward."""
        state, settings, transform, path = read_official(source)
        try:
            model = build_predictor(state, settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), transform, batch_size=batch_size)

    def scores(self, audio: Tensor, sample_rate: int) -> dict[str, Tensor]:
        """audio (B, T) of any rate in Hz -> {"CE", "CU", "PC", "PQ"}: (B,) float32 on the CPU.

        Clips over 10 s are scored in windows of 10 s, the last padded with silence that is masked, and averaged by the
        windows' lengths. Float32 throughout, as in the official predictor, whose bf16 switch has no effect.
        """
        audio = check_audio(audio)
        device = next(self.model.parameters()).device
        with exact_float32(device):
            parts = [self._score(part.to(device), sample_rate) for part in audio.split(self.batch_size)]
        return dict(zip(AXES, torch.cat(parts).unbind(1), strict=True))

    def _score(self, audio: Tensor, sample_rate: int) -> Tensor:
        audio = torchaudio.functional.resample(audio, int(sample_rate), SAMPLE_RATE)
        clips, length = audio.shape
        count = -(-length // WINDOW)
        windows = F.pad(audio, (0, count * WINDOW - length)).view(clips * count, WINDOW)
        lengths = (length - WINDOW * torch.arange(count, device=audio.device)).clamp(max=WINDOW)
        pairs = zip(windows.split(self.batch_size), lengths.repeat(clips).split(self.batch_size), strict=True)
        raw = torch.cat([self.model(*pair) for pair in pairs]).view(clips, count, len(AXES)).cpu()
        weights = (lengths / lengths.sum()).cpu()
        return self.mean + self.std * torch.einsum("w,bwa->ba", weights, raw)
