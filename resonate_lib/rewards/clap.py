"""A small contrastive audio-text model (CLAP) and the reward it gives: the cosine between a clip and its caption.

Audio: log1p(100·mel) frames, two strided convolutions, a transformer over time. Text: a transformer over MiniLM's token
states with positions, since a mean-pooled sentence hardly tells "a, then b" from "b, then a". Trained with InfoNCE over
the batch's captions plus hard negatives: the clip's own caption with one event, the order or a count changed.
Source: LAION-CLAP (arXiv 2211.06687) for the objective; the hard negatives are what small data needs beyond it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torchaudio
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from resonate_lib.models import storage
from resonate_lib.rewards.base import RewardResult, initial_seed, learning_rate_at, to_clip
from resonate_lib.training import atomic_folder


@dataclass(frozen=True)
class ClapConfig:
    """What a SmallCLAP is built from; stored beside its weights."""

    sample_rate: int = 16000  # Hz
    seconds: float = 4.0  # length of a clip; shorter ones are padded with silence
    n_fft: int = 1024
    hop: int = 320  # samples between frames: 50 frames a second
    bands: int = 64  # mel bands
    width: int = 128  # of both towers
    heads: int = 4
    audio_layers: int = 3
    text_layers: int = 2
    text_width: int = 384  # of the frozen encoder's token states
    max_tokens: int = 77
    embedding: int = 128  # of the shared space


class Tower(nn.Module):
    """A pre-norm transformer over x (B, L, width) with learned positions; its first, learned token becomes the unit
    vector (B, embedding). mask (B, L) is True where a token counts."""

    def __init__(self, config: ClapConfig, layers: int, length: int):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(length, config.width))
        self.summary = nn.Parameter(0.02 * torch.randn(config.width))
        layer = nn.TransformerEncoderLayer(
            config.width,
            config.heads,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(config.width), enable_nested_tensor=False)
        self.out = nn.Linear(config.width, config.embedding)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the unit vectors (B, embedding) and the tokens (B, L, width) behind them."""
        x = x + self.positions[: x.shape[1]]
        x = torch.cat([self.summary.expand(len(x), 1, -1), x], dim=1)
        padding = None if mask is None else F.pad(~mask, (1, 0))
        x = self.encoder(x, src_key_padding_mask=padding)
        return F.normalize(self.out(x[:, 0]).float(), dim=-1), x[:, 1:]


class SmallCLAP(nn.Module):
    """Two towers into one space. `text` is the frozen token encoder, kept out of the state dict."""

    def __init__(self, config: ClapConfig = ClapConfig(), *, text: Callable | None = None, cache_limit: int = 8192):
        super().__init__()
        self.config = config
        self.mel = torchaudio.transforms.MelSpectrogram(
            config.sample_rate, config.n_fft, hop_length=config.hop, n_mels=config.bands, power=1.0
        )
        frames = round(config.sample_rate * config.seconds) // config.hop + 1
        self.register_buffer("mean", torch.zeros(config.bands, 1))
        self.register_buffer("deviation", torch.ones(config.bands, 1))
        self.stem = nn.Sequential(
            nn.Conv1d(config.bands, config.width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv1d(config.width, config.width, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.audio_tower = Tower(config, config.audio_layers, (frames + 3) // 4)
        self.text_in = nn.Linear(config.text_width, config.width)
        self.text_tower = Tower(config, config.text_layers, config.max_tokens)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._cache, self._limit = {}, cache_limit
        object.__setattr__(self, "_text", text)  # not as a submodule: its weights are not ours to save

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def features(self, audio: Tensor) -> Tensor:
        """audio (B, T) at the model's rate -> log1p(100·mel), standardised by band: (B, bands, frames)."""
        return (torch.log1p(100 * self.mel(audio.float())) - self.mean) / self.deviation

    def audio_tokens(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """audio (B, T) -> unit vectors (B, embedding) and time tokens (B, ~12.5 a second, width)."""
        with torch.autocast(audio.device.type, enabled=False):
            features = self.features(audio)
        return self.audio_tower(self.stem(features).transpose(1, 2))

    def encode_audio(self, audio: Tensor) -> Tensor:
        """audio (B, T) at the model's rate and length -> unit vectors (B, embedding)."""
        return self.audio_tokens(audio.to(self.device))[0]

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> unit vectors (B, embedding)."""
        states, mask = self._states(list(captions))
        return self.text_tower(self.text_in(states), mask)[0]

    def _states(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Frozen token states (B, L, text_width) and their mask (B, L), each caption encoded once and kept on the CPU
        until the cache is full: in training the same captions come back."""
        missing = [c for c in dict.fromkeys(captions) if c not in self._cache]
        if missing and len(self._cache) + len(missing) > self._limit:
            self._cache.clear()
            missing = list(dict.fromkeys(captions))
        for start in range(0, len(missing), 64):
            chunk = missing[start : start + 64]
            self._cache.update(zip(chunk, self._encode(chunk), strict=True))
        states = nn.utils.rnn.pad_sequence([self._cache[c] for c in captions], batch_first=True)
        lengths = torch.tensor([len(self._cache[c]) for c in captions])
        mask = torch.arange(states.shape[1]) < lengths[:, None]
        return states.to(self.device), mask.to(self.device)

    def forget(self) -> None:
        """Empties the cache: after training, where states may have been computed in bf16."""
        self._cache.clear()

    def _encode(self, captions: list[str]) -> list[Tensor]:
        if self._text is None:
            from resonate_lib.models.text import MiniLMEncoder  # 90 MB: only loaded when a caption comes

            object.__setattr__(self, "_text", MiniLMEncoder())
        with torch.no_grad():
            states = self._text(captions).text_f.float().cpu()
        # Padding is rows of zeros at the end.
        last = (states.abs().sum(-1) > 0).long().cumsum(-1).argmax(-1) + 1
        return [row[:n].clone() for row, n in zip(states, last.tolist(), strict=True)]


class ClapReward:
    """The cosine between a clip and its prompt, in [-1, 1] (not a probability: only differences mean something).

    The audio may have any sample rate; it is resampled to the model's.
    """

    def __init__(self, model: SmallCLAP, *, card: dict | None = None, batch_size: int = 64):
        self.model, self.card, self.batch_size = model.eval(), card or {}, batch_size

    @torch.no_grad()
    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        texts, sounds = self.embed_text(prompts), self.embed_audio(audio, sample_rate)
        return RewardResult((sounds * texts).sum(-1).clamp(-1, 1))

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """The cosines (B,) with their gradient to the audio (B, T), all clips at once, on the model's device."""
        config = self.model.config
        clips = to_clip(audio.float(), sample_rate, config.sample_rate, config.seconds)
        with torch.no_grad():
            texts = self.model.encode_text(prompts)
        return (self.model.encode_audio(clips) * texts).sum(-1)

    @torch.no_grad()
    def embed_audio(self, audio: Tensor, sample_rate: int) -> Tensor:
        """audio (B, T) in [-1, 1] -> unit vectors (B, embedding) on the CPU."""
        config = self.model.config
        clips = to_clip(audio.float(), sample_rate, config.sample_rate, config.seconds)
        return torch.cat([self.model.encode_audio(part) for part in clips.split(self.batch_size)]).cpu()

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> unit vectors (B, embedding) on the CPU."""
        return self.model.encode_text(prompts).cpu()

    def save(self, directory: str | Path) -> None:
        """Writes model.safetensors (8 bits a weight, see `storage`) and config.json (the configuration and how it was trained)."""
        with atomic_folder(directory) as folder:
            save_file(storage.packed(self.model.state_dict(), 8), folder / "model.safetensors")
            content = {"class": "SmallCLAP", "config": dataclasses.asdict(self.model.config), "training": self.card}
            (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, *, text: Callable | None = None) -> ClapReward:
        """Reads what `save` wrote. text: the token encoder it was trained on (default: MiniLM)."""
        folder = Path(directory)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {folder}: name the folder that ClapReward.save wrote")
        content = json.loads((folder / "config.json").read_text())
        model = SmallCLAP(ClapConfig(**content["config"]), text=text)
        model.load_state_dict(storage.read(folder / "model.safetensors"))
        return cls(model, card=content["training"])


def info_nce(
    sounds: Tensor,
    texts: Tensor,
    hard: Tensor,
    scale: Tensor,
    *,
    same: Tensor | None = None,
    absent: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE in nats; an audio also has to tell its caption from its own hard negatives.

    sounds, texts: (B, D) unit vectors, row i of one belongs to row i of the other. hard: (B, K, D). same: (B, B) bool, True where
    two rows carry the same caption, which then is no negative. absent: (B, K) bool, True where there is no hard negative.
    """
    batch = len(sounds)
    pairs = scale * sounds @ texts.T
    if same is not None:
        pairs = pairs.masked_fill(same & ~torch.eye(batch, dtype=torch.bool, device=pairs.device), -torch.inf)
    against = scale * torch.einsum("bd,bkd->bk", sounds, hard)
    if absent is not None:
        against = against.masked_fill(absent, -torch.inf)
    target = torch.arange(batch, device=pairs.device)
    audio_to_text = F.cross_entropy(torch.cat([pairs, against], dim=1), target)
    return 0.5 * (audio_to_text + F.cross_entropy(pairs.T, target))


def _pick_negatives(negatives: list[dict], count: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """count hard negatives a row, drawn from its kinds without putting back: B·count captions ("" where a row has
    fewer) and absent (B, count)."""
    chosen = []
    for row in negatives:
        options = [row[kind] for kind in sorted(row)]
        order = torch.randperm(len(options), generator=generator)[:count].tolist()
        chosen += [options[k] for k in order] + [""] * (count - len(order))
    return chosen, torch.tensor([c == "" for c in chosen]).view(len(negatives), count)


def _clap_loss(
    model: SmallCLAP, batch: dict, hard_negatives: int, generator: torch.Generator
) -> tuple[Tensor, dict, Tensor]:
    captions = list(batch["captions"])
    chosen, absent = _pick_negatives(batch["negatives"], hard_negatives, generator)
    sounds, tokens = model.audio_tokens(batch["audio"].to(model.device))
    texts = model.encode_text(captions + [c or captions[0] for c in chosen])
    texts, hard = texts[: len(captions)], texts[len(captions) :].view(len(captions), hard_negatives, -1)
    same = torch.tensor([[a == b for b in captions] for a in captions], device=sounds.device)
    absent = absent.to(sounds.device)
    loss = info_nce(sounds, texts, hard, model.log_scale.exp().clamp(max=100), same=same, absent=absent)
    with torch.no_grad():
        margin = (sounds * texts).sum(-1, keepdim=True) - torch.einsum("bd,bkd->bk", sounds, hard)
        won = (margin[~absent] > 0).float().mean() if (~absent).any() else torch.tensor(1.0)
    return loss, {"loss": loss.item(), "hard_won": won.item()}, tokens


def fit_clap(
    corpus,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    config: ClapConfig = ClapConfig(),
    text: Callable | None = None,
    learning_rate: float = 1e-3,
    hard_negatives: int = 2,
    activity_weight: float = 0.5,
    checkpoint: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> tuple[ClapReward, list[dict]]:
    """Trains a SmallCLAP from nothing; returns the reward and the history (loss in nats, share of hard negatives beaten).

    corpus.batch(generator, size) -> dict(audio (B, T) float32 at config.sample_rate, captions, negatives: list of
    {kind: caption}); where it also holds activity (B, frames, classes) in [0, 1], a throw-away linear head predicts it
    from the time tokens with weight activity_weight: it tells the audio tower early what there is to hear.
    hard_negatives: how many of a clip's kinds are drawn each step. Dropout is not used, so a resumed run repeats.
    """
    from resonate_lib.training import autocast, fit

    first = corpus.batch(initial_seed(seed), batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCLAP(config, text=text)
        head = nn.Linear(config.width, first["activity"].shape[-1] if "activity" in first else 1)
    with torch.no_grad():
        raw = model.features(first["audio"])
        model.mean.copy_(raw.mean(dim=(0, 2))[:, None])
        model.deviation.copy_(raw.std(dim=(0, 2))[:, None].clamp_min(0.1))
    model, head = model.to(device).train(), head.to(device)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate)
        batch = corpus.batch(generator, batch_size)
        with autocast(precision, device):
            loss, numbers, tokens = _clap_loss(model, batch, hard_negatives, generator)
            if "activity" in batch and activity_weight > 0:
                active = activity_loss(head(tokens), batch["activity"].to(device))
                numbers["activity"] = active.item()
                loss = loss + activity_weight * active
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return numbers

    modules = {"model": model, "head": head, "optimizer": optimizer}
    history = fit(step, steps=steps, modules=modules, label="CLAP", seed=seed, checkpoint=checkpoint)
    model.forget()
    card = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    return ClapReward(
        model, card=card | {"hard_negatives": hard_negatives, "activity_weight": activity_weight}
    ), history


def activity_loss(logits: Tensor, activity: Tensor) -> Tensor:
    """Binary cross-entropy of frame-level event logits (B, L, classes) with activity (B, frames, classes) in [0, 1],
    averaged down to L frames."""
    target = F.adaptive_avg_pool1d(activity.float().transpose(1, 2), logits.shape[1]).transpose(1, 2)
    return F.binary_cross_entropy_with_logits(logits.float(), target)
