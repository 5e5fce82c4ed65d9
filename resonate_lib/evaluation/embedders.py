"""What is heard of a clip before sets of clips are compared: vectors of a CLAP or of the judge, class logits, a fingerprint.

Every embedder carries a name, which the tables of its numbers repeat. `Heard` keeps what embedders hear while the benchmark
runs. What is computed from the vectors lives in `distance.py` (sets against real ones) and `metrics.py` (within one set).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from resonate_lib.data import scenes
from resonate_lib.rewards.base import to_clip

CHUNK = 64  # clips that are heard together
FINGERPRINT = "fingerprint"
PRINT_RATE, PRINT_HOP, PRINT_BANDS = 16000, 1280, 32  # Hz, samples (12.5 frames a second), mel bands
PRINT_RANGE = 30.0  # dB under the clip's peak: what is quieter counts as silence


@dataclass(frozen=True)
class Embedder:
    """embed(audio (B, T), sample_rate in Hz) -> (B, D) float32 on the CPU, and the name that tables state beside its numbers."""

    name: str
    embed: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class Clips:
    """What one embedder heard of one set of clips, with all that a number about the set has to state.

    name: the set's, a system or "originals". vectors (M, D) float64; ids (M,): the prompt of each clip. embedding: the embedder's
    name. seconds: the length of a clip. ValueError for no clips, for vectors that are not finite, and for other shapes.
    """

    name: str
    vectors: np.ndarray
    ids: np.ndarray
    embedding: str
    seconds: float

    def __post_init__(self):
        vectors, ids = np.asarray(self.vectors, np.float64), np.asarray(self.ids)
        if vectors.ndim != 2 or not len(vectors) or ids.shape != (len(vectors),):
            raise ValueError(f"{self.name!r}: vectors {vectors.shape} and ids {ids.shape}; (M, D) and (M,) with M > 0 are needed")
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.name!r}: {self.embedding} gave values that are not finite; look for silent or broken clips")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "ids", ids)


def clap_space(clap, name: str) -> Embedder:
    """The unit vectors of a CLAP reward (`ClapReward`, `LaionClapReward`); name: which CLAP it is."""
    return Embedder(name, clap.embed_audio)


def zero_shot(clap, phrases: Sequence[str], name: str) -> Embedder:
    """Logits of phrases as a CLAP gives them to a clip: cosine times the scale it learned; their softmax are probabilities.

    The name tells the CLAP's and how many phrases there are. ValueError for fewer than two different phrases.
    """
    phrases = list(dict.fromkeys(phrases))
    if len(phrases) < 2:
        raise ValueError(f"{len(phrases)} phrases: a distribution over them needs two or more different ones")
    texts = clap.embed_text(phrases)
    scale = clap.model.log_scale if hasattr(clap.model, "log_scale") else clap.model.logit_scale_a  # ours, laion-clap's
    texts = texts * float(scale.detach().exp().clamp(max=100))
    return Embedder(f"{name}, zero-shot over {len(phrases)} phrases", lambda *sound: clap.embed_audio(*sound) @ texts.T)


def event_phrases(records: Sequence[dict]) -> list[str]:
    """The events that prompts list, each once: in lower case and without counts ("dog x3" is "dog"); a prompt without a list gives
    its text."""
    listed = [phrase for record in records for phrase in record.get("event_list") or [record["prompt_text"]]]
    return list(dict.fromkeys(re.sub(r" x\d+$", "", phrase).strip().lower() for phrase in listed))


def judge_events(judge) -> Embedder:
    """The independent judge's logit of every event (`Judge.hear`)."""
    return Embedder(f"judge, {len(scenes.CLASSES)} events", lambda *sound: judge.hear(_scene(*sound))[1])


def _scene(audio: Tensor, sample_rate: int) -> Tensor:
    return to_clip(audio.float(), sample_rate, scenes.SAMPLE_RATE, scenes.SECONDS)


def fingerprint() -> Embedder:
    """Unit vectors whose cosine says whether two clips are one sound, whatever their gain: how the level of each of 32 mel bands
    moves about its own mean over time, at 12.5 Hz. Silent clips give zeros."""
    return Embedder(FINGERPRINT, lambda audio, sample_rate: torch.cat([_prints(part, sample_rate) for part in audio.split(CHUNK)]))


def _prints(audio: Tensor, sample_rate: int) -> Tensor:
    mel = _mel()(torchaudio.functional.resample(audio.float().cpu(), int(sample_rate), PRINT_RATE))
    peak = mel.amax(dim=(1, 2), keepdim=True).clamp(min=1e-10)
    level = (20 * torch.log10(mel / peak)).clamp(min=-PRINT_RANGE)
    return F.normalize((level - level.mean(dim=2, keepdim=True)).flatten(1), dim=-1)


@cache
def _mel() -> torchaudio.transforms.MelSpectrogram:
    return torchaudio.transforms.MelSpectrogram(PRINT_RATE, 2048, hop_length=PRINT_HOP, n_mels=PRINT_BANDS, power=1.0)


@torch.no_grad()
def embed_clips(embedder: Embedder, audio: Tensor, sample_rate: int, ids: Sequence, name: str) -> Clips:
    """A set of clips (M, T) as one embedder hears it; ids: the prompt of each clip; name: the set's."""
    vectors = torch.cat([embedder.embed(part, sample_rate).float().cpu() for part in audio.split(CHUNK)])
    return Clips(name, vectors.numpy(), np.asarray(ids), embedder.name, round(audio.shape[-1] / sample_rate, 2))


class Heard:
    """A scorer of `ttabench.evaluate` that keeps what embedders hear of every clip, to be asked for by rows later.

    Its one column, `sound`, is a number made of the clip's own samples (48 bits of their hash), so rows may be sorted, dropped
    and joined, and rows of clips it has not heard are an error. It is of no use in a file: what was heard is not kept there.
    """

    def __init__(self, embedders: Sequence[Embedder]):
        self.embedders = {embedder.name: embedder for embedder in embedders}
        self._vectors: dict[str, dict[int, np.ndarray]] = {name: {} for name in self.embedders}
        self._seconds: dict[int, float] = {}

    @torch.no_grad()
    def scores(self, audio: Tensor, sample_rate: int) -> dict[str, Tensor]:
        """audio (B, T) -> {"sound": (B,)}."""
        sounds = [_number(clip) for clip in audio]
        for name, embedder in self.embedders.items():
            self._vectors[name].update(zip(sounds, embedder.embed(audio, sample_rate).float().cpu().numpy(), strict=True))
        self._seconds.update(dict.fromkeys(sounds, round(audio.shape[-1] / sample_rate, 2)))
        return {"sound": torch.tensor(sounds, dtype=torch.float64)}  # 48 bits fit a double exactly

    def clips(self, rows: pd.DataFrame, embedding: str, name: str) -> Clips:
        """What the embedder `embedding` heard of the rows' clips, in their order. ValueError for rows it has not heard."""
        if embedding not in self._vectors:
            raise ValueError(f"no embedder {embedding!r} has listened: there are {', '.join(self._vectors)}")
        sounds = [int(sound) for sound in rows["sound"]]
        unheard = sum(sound not in self._seconds for sound in sounds)
        if unheard or not sounds:
            raise ValueError(f"{name!r}: {unheard} of {len(sounds)} rows are of clips not heard here; score them with this scorer")
        lengths = {self._seconds[sound] for sound in sounds}
        if len(lengths) > 1:
            raise ValueError(f"{name!r}: clips of {sorted(lengths)} s in one set; keep rows of one length")
        vectors = np.stack([self._vectors[embedding][sound] for sound in sounds])
        return Clips(name, vectors, rows["id"].to_numpy(), embedding, lengths.pop())

    def by_system(self, rows: pd.DataFrame, embedding: str) -> list[Clips]:
        """`clips` of each system in the rows, in their order."""
        return [self.clips(group, embedding, str(system)) for system, group in rows.groupby("system", sort=False)]


def _number(clip: Tensor) -> int:
    samples = clip.detach().to("cpu", torch.float32).contiguous().numpy()
    return int.from_bytes(hashlib.blake2b(samples.tobytes(), digest_size=6).digest(), "big")
