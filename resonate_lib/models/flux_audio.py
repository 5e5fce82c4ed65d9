"""FluxAudio, the flow transformer that predicts the velocity of an audio latent from text and time.

Parameter names, shapes and results are those of the published network (arXiv 2603.11661), so its checkpoints load with
`load_state_dict(strict=True)`. The time convention is in `flow.py`; blocks are in `layers.py`; text encoders and
codecs live elsewhere.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resonate_lib.models.layers import (
    MAX_LATENT_POSITIONS,
    MLP,
    Block,
    ChannelLastConv,
    ConvMLP,
    FinalBlock,
    JointBlock,
    TimestepEmbedder,
    rope_table,
)

if TYPE_CHECKING:
    from resonate_lib.models.lora import Adapter

_STRAY_KEYS = ("t_embed.freqs", "latent_rot", "text_rot")


class _TextTensors(NamedTuple):
    text_f: Tensor
    text_f_c: Tensor


class Condition(_TextTensors):
    """What the network hears of a prompt: text_f (B, L, text_dim) token states, text_f_c (B, text_c_dim) pooled."""

    __slots__ = ()

    @property
    def batch(self) -> int:
        """B, the number of prompts."""
        return self.text_f.shape[0]

    def index(self, idx) -> "Condition":
        """Rows `idx` (slice, list, or index tensor) of the batch."""
        return type(self)(self.text_f[idx], self.text_f_c[idx])

    def repeat(self, k: int) -> "Condition":
        """Each row k times in a row (a a b b ...): the order in which groups are rolled out."""
        return type(self)(self.text_f.repeat_interleave(k, 0), self.text_f_c.repeat_interleave(k, 0))

    def to(self, *args, **kwargs) -> "Condition":
        """As `Tensor.to`, of both tensors."""
        return type(self)(self.text_f.to(*args, **kwargs), self.text_f_c.to(*args, **kwargs))

    @classmethod
    def cat(cls, conditions: list) -> "Condition":
        """Join along the batch. ValueError when token counts differ: padding is part of the condition, so it must
        agree.
        """
        lengths = sorted({c.text_f.shape[1] for c in conditions})
        if len(lengths) > 1:
            raise ValueError(
                f"conditions of {lengths} text tokens cannot share a batch: pad every prompt to one length"
            )
        return cls(torch.cat([c.text_f for c in conditions]), torch.cat([c.text_f_c for c in conditions]))


class ProjectedText(Condition):
    """A Condition after the network's own text projections: (B, L, D) and (B, D). Neither t nor x enters it."""

    __slots__ = ()


def _fixed(tensor: Tensor | None, fill: float, shape: tuple[int, ...]) -> nn.Parameter:
    """A stored, never trained parameter of `shape`, `fill` where no tensor is given."""
    tensor = torch.full(shape, fill) if tensor is None else torch.as_tensor(tensor, dtype=torch.float32).reshape(shape)
    return nn.Parameter(tensor.clone(), requires_grad=False)


class FluxAudio(nn.Module):
    """The flow transformer: `depth` blocks in all, the last `fused_depth` of them over the latent alone.

    latent_dim C, text_dim / text_c_dim of the encoder, hidden_dim D (a multiple of num_heads with an even head width).
    latent_seq_len is the usual N (no weight depends on it); N up to max(2048, latent_seq_len), L up to max(77,
    text_seq_len). mlp_ratio sets the gated MLPs' width (see `layers.gated_width`). latent_mean / latent_std (C,) and
    empty_string_feat (text_seq_len, text_dim) / empty_string_feat_c (text_c_dim,) are stored in the checkpoint, which
    overrides what is given here; means and deviations are NaN and the empty string zeros until then.

    checkpointing: set it to compute the blocks again in the backward pass of training instead of keeping what they hold
    (a third more arithmetic for a fraction of the memory, same gradients). adapter: what the last LoRA training merged into
    the weights (see `models.lora`). Neither is stored with the weights.
    """

    checkpointing: bool = False
    adapter: "Adapter | None" = None

    def __init__(
        self, *, latent_dim: int, text_dim: int, text_c_dim: int, hidden_dim: int, depth: int, fused_depth: int,
        num_heads: int, latent_seq_len: int, text_seq_len: int = 77, use_rope: bool = True, mlp_ratio: float = 4.0,
        latent_mean: Tensor | None = None, latent_std: Tensor | None = None,
        empty_string_feat: Tensor | None = None, empty_string_feat_c: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if hidden_dim % (2 * num_heads):
            raise ValueError(
                f"hidden_dim={hidden_dim}, num_heads={num_heads}: the width of a head must be an even whole number"
            )
        if not 0 <= fused_depth < depth:
            raise ValueError(
                f"fused_depth={fused_depth}: allowed 0 to depth-1={depth - 1}; text needs a joint block to be heard"
            )
        self.latent_dim, self.hidden_dim, self.use_rope = latent_dim, hidden_dim, use_rope
        self.latent_seq_len, self.text_seq_len = latent_seq_len, text_seq_len
        self.head_dim, joint_depth, inner = hidden_dim // num_heads, depth - fused_depth, int(hidden_dim * mlp_ratio)

        self.latent_mean = _fixed(latent_mean, float("nan"), (1, 1, latent_dim))
        self.latent_std = _fixed(latent_std, float("nan"), (1, 1, latent_dim))
        self.empty_string_feat = _fixed(empty_string_feat, 0.0, (text_seq_len, text_dim))
        self.empty_string_feat_c = _fixed(empty_string_feat_c, 0.0, (text_c_dim,))
        self.audio_input_proj = nn.Sequential(
            ChannelLastConv(latent_dim, hidden_dim, 7), nn.SELU(), ConvMLP(hidden_dim, inner, 7)
        )
        self.text_input_proj = nn.Sequential(nn.Linear(text_dim, hidden_dim), MLP(hidden_dim, inner))
        self.text_cond_proj = nn.Sequential(nn.Linear(text_c_dim, hidden_dim), MLP(hidden_dim, inner))
        self.final_layer = FinalBlock(hidden_dim, latent_dim)
        self.t_embed = TimestepEmbedder(hidden_dim)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_dim, num_heads, inner, pre_only=i == joint_depth - 1) for i in range(joint_depth)
        )
        self.fused_blocks = nn.ModuleList(
            Block(hidden_dim, num_heads, inner, kernel_size=3) for _ in range(fused_depth)
        )
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform linear maps, zero modulation and output, PyTorch's own convolutions: the output starts at
        exactly 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embed.mlp[2].weight, std=0.02)
        zero = [m.adaLN_modulation[1] for m in self.modules() if hasattr(m, "adaLN_modulation")]
        for module in (*zero, self.final_layer.conv):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    # ------------------------------------------------------------------ conditions and scale
    def empty_condition(self, batch: int) -> Condition:
        """The stored features of the empty string, `batch` times (views, nothing is copied)."""
        return Condition(
            self.empty_string_feat[None].expand(batch, -1, -1), self.empty_string_feat_c[None].expand(batch, -1)
        )

    def _check_statistics(self) -> None:
        if not bool(torch.isfinite(self.latent_mean).all() and torch.isfinite(self.latent_std).all()):
            raise ValueError(
                "latent_mean / latent_std are unset: give them to FluxAudio(...) or load a checkpoint that has them"
            )

    def normalize(self, latent: Tensor) -> Tensor:
        """Codec latent (B, N, C) -> network space, per channel."""
        self._check_statistics()
        return (latent - self.latent_mean) / self.latent_std

    def unnormalize(self, latent: Tensor) -> Tensor:
        """Network space (B, N, C) -> codec latent; the published RL code forgets this before decoding."""
        self._check_statistics()
        return latent * self.latent_std + self.latent_mean

    def project_text(self, condition: Condition) -> ProjectedText:
        """The text projections: once per sampling run, since they depend on neither t nor x. Gradients flow through."""
        return ProjectedText(self.text_input_proj(condition.text_f), self.text_cond_proj(condition.text_f_c))

    # ------------------------------------------------------------------ velocity
    def _tables(self, frames: int, tokens: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Rotations of both streams, each counting from 0."""
        limits = max(MAX_LATENT_POSITIONS, self.latent_seq_len), max(77, self.text_seq_len)
        for name, length, limit in (("latent frames", frames, limits[0]), ("text tokens", tokens, limits[1])):
            if length > limit:
                raise ValueError(f"{length} {name}: at most {limit} have a rotary position; shorten the input")
        if not self.use_rope:
            return None, None
        latent, text = (rope_table(limit, self.head_dim, device) for limit in limits)
        return latent[:frames], text[:tokens]

    def velocity(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        """Velocity (B, N, C) at x = latent (B, N, C) and t (B,) or 0-dim, given `project_text`'s result for the batch.
        """
        tables = self._tables(latent.shape[1], text.text_f.shape[1], latent.device)
        t = torch.as_tensor(t, device=latent.device).expand(latent.shape[0])
        c = self.t_embed(t)[:, None] + text.text_f_c[:, None]
        c_act = F.silu(c)  # the nonlinearity in front of every block's modulation
        x, tokens = self.audio_input_proj(latent), text.text_f
        for block in self.joint_blocks:
            x, tokens = self._run(block, x, tokens, c_act, tables)
        for block in self.fused_blocks:
            x = self._run(block, x, c_act, tables[0])
        return self.final_layer(x, c_act)

    def _run(self, block: nn.Module, *inputs):
        """The block's output; with `checkpointing`, in training with gradients, only its inputs are kept for the backward."""
        if not (self.checkpointing and self.training and torch.is_grad_enabled()):
            return block(*inputs)
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)

    def forward(self, latent: Tensor, text_f: Tensor, text_f_c: Tensor, t: Tensor) -> Tensor:
        """latent (B, N, C), text_f (B, L, text_dim), text_f_c (B, text_c_dim), t (B,) -> velocity (B, N, C)."""
        return self.velocity(latent, self.project_text(Condition(text_f, text_f_c)), t)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Strict by default; drops the three stray buffers that some published files still carry."""
        kept = {key: value for key, value in state_dict.items() if key not in _STRAY_KEYS}
        return super().load_state_dict(kept, strict=strict, assign=assign)


def fluxaudio_m_44k(**overrides) -> FluxAudio:
    """The published 468-million network for 44.1 kHz: 16 joint and 36 fused blocks of width 448, FLAN-T5-large text."""
    config = {
        "latent_dim": 40, "text_dim": 1024, "text_c_dim": 1024, "hidden_dim": 448, "depth": 52, "fused_depth": 36,
        "num_heads": 7,
        "latent_seq_len": 430, "text_seq_len": 77, "use_rope": True,
    }  # fmt: skip
    return FluxAudio(**{**config, **overrides})
