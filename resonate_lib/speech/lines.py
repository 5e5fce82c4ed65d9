"""What the speaker is asked to say and how: lines with a pitch and a rate, natural speech of them, and the measures that tell from
a clip alone whether it has the pitch and the rate asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from resonate_lib.data.speech import Utterance, draw_utterances, speak
from resonate_lib.rewards.rules import words

VOICE = "en-us"  # the speaker has one voice
KINDS = ("command", "number", "name", "rare")
HARDEST = 2  # level of difficulty: harder lines take longer than 4 seconds
PITCH = {"low": 15, "mid": 50, "high": 85}  # espeak-ng's scale, 0 to 99
RATE = {"slow": 110, "normal": 165, "fast": 235}  # words per minute
LOWEST, HIGHEST = 60, 400  # Hz, of a voice
EDGE = 5  # letters: as much longer is a sentence for its slower end (with 0 natural rates are told in 0.84, with it in 0.90)
LOUD = 10 ** (-35 / 20)  # of the loudest frame: what is quieter is a pause


@dataclass(frozen=True)
class Line:
    """A text and how it is to be said."""

    text: str
    pitch: str = "mid"  # one of PITCH
    rate: str = "normal"  # one of RATE
    kind: str = "own"
    level: int = 0

    def __post_init__(self) -> None:
        for name, known in (("pitch", PITCH), ("rate", RATE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(known)}")

    def as_dict(self) -> dict:
        """Plain values, as JSON holds them."""
        return asdict(self)


def draw_lines(count: int, *, split: str, seed: int, kinds: Sequence[str] = KINDS) -> list[Line]:
    """`count` lines of a split, every pitch and rate as likely as any other. Errors as in `draw_utterances`."""
    easy = [one for one in draw_utterances(3 * count + 20, split=split, seed=seed, kinds=kinds) if one.level <= HARDEST]
    random = np.random.default_rng([seed, 71])
    ways = random.integers(3, size=(count, 2)).tolist()
    asked = zip(easy[:count], ways, strict=True)
    return [Line(one.text, list(PITCH)[p], list(RATE)[r], one.kind, one.level) for one, (p, r) in asked]


def natural(lines: Sequence[Line]) -> list[Tensor]:
    """The lines as espeak-ng says them: clips (T_i,) at 16 kHz, clean. Errors as in `speak`; equal margins and levels."""
    template = Utterance("line", "", "command", 0, VOICE, 0, 0, (), None, 0)
    asked = [replace(template, text=line.text, rate=RATE[line.rate], pitch=PITCH[line.pitch]) for line in lines]
    return speak(asked)


def pitch_hz(clip: Tensor, sample_rate: int) -> float:
    """Median fundamental frequency in Hz of the loud frames of a clip (T,), nan where there are none.

    By autocorrelation of 40 ms frames: the first peak that is nearly the highest, since twice the period fits as well.
    """
    frame, hop = round(0.04 * sample_rate), round(0.01 * sample_rate)
    if len(clip) < frame:
        return float("nan")
    frames = clip.float().unfold(0, frame, hop)
    level = frames.square().mean(1).sqrt()
    if not level.max() > 0:
        return float("nan")
    frames = (frames - frames.mean(1, keepdim=True))[level > LOUD * level.max()]
    spectrum = torch.fft.rfft(frames, 2 * frame).abs().square()
    correlation = torch.fft.irfft(spectrum)[:, :frame]
    correlation = correlation / torch.arange(frame, 0, -1) / (correlation[:, :1] / frame).clamp_min(1e-12)
    low, high = sample_rate // HIGHEST, sample_rate // LOWEST
    before, here, after = (correlation[:, low + k : high + k] for k in (-1, 0, 1))
    peak = here.amax(1, keepdim=True)
    tops = (here >= before) & (here >= after) & (here > 0.9 * peak)
    voiced = (peak[:, 0] > 0.5) & tops.any(1)
    return float((sample_rate / (low + tops[voiced].float().argmax(1))).median()) if voiced.any() else float("nan")


def letter_seconds(clip: Tensor, sample_rate: int, text: str) -> float:
    """Seconds from the first to the last loud frame a letter of the text, EDGE letters added; nan for silence or no letters."""
    letters, hop = len(" ".join(words(text))), round(0.01 * sample_rate)
    level = clip[: len(clip) // hop * hop].view(-1, hop).square().mean(1).sqrt()
    loud = (level > LOUD * level.max()).nonzero().flatten() if len(level) else level
    return float(loud[-1] - loud[0] + 1) * 0.01 / (letters + EDGE) if letters and len(loud) and level.max() > 0 else float("nan")


def measures(clip: Tensor, sample_rate: int, text: str) -> dict[str, float]:
    """Both measures of a clip."""
    return {"pitch": pitch_hz(clip, sample_rate), "rate": letter_seconds(clip, sample_rate, text)}


def learn_limits(lines: Sequence[Line], clips: Sequence[Tensor], sample_rate: int) -> dict[str, list[float]]:
    """For pitch and rate the two values that part their three classes: midway between the medians of natural clips."""
    found = [measures(clip, sample_rate, line.text) for line, clip in zip(lines, clips, strict=True)]
    limits = {}
    for name, known in (("pitch", PITCH), ("rate", RATE)):
        middle = [np.nanmedian([f[name] for f, line in zip(found, lines, strict=True) if getattr(line, name) == k] or [np.nan])
                  for k in known]  # fmt: skip
        limits[name] = [float(a + b) / 2 for a, b in zip(middle, middle[1:], strict=False)]
    return limits


def class_of(name: str, value: float, limits: Mapping[str, Sequence[float]]) -> str:
    """The class of a measured value; "" for nan. Pitches rise with their classes, seconds a letter fall."""
    first, second = limits[name]
    known = list(PITCH if name == "pitch" else RATE)
    if not np.isfinite(value):
        return ""
    return known[int((value > first) == (second > first)) + int((value > second) == (second > first))]
