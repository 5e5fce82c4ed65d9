"""Speech of another world: every word is a pair of tones. A stand-in for a spoken corpus that is learnt in seconds."""

from dataclasses import dataclass

import numpy as np
import torch

from resonate_lib.rewards.lalm import LalmShape

WORDS = ("red", "green", "blue", "seven", "window", "banjo")
RATE = 16000
SHAPE = LalmShape(seconds=2, mels=32, n_fft=512, hop=250, width=48, heads=2, audio_layers=2, text_layers=2)


@dataclass(frozen=True)
class Said:
    id: str
    text: str
    kind: str = "command"
    voice: str = "tones"
    keywords: tuple[str, ...] = ()


def said(name, text):
    kind = "silence" if not text else "long" if len(text.split()) > 4 else "command"
    return Said(name, text, kind, keywords=tuple(word for word in text.split() if word == "banjo"))


class Tones:
    """As `data.speech.SpeechCorpus`, of which it has what recognition reads."""

    sample_rate = RATE

    def __init__(self, texts, *, seed: int = 0, noise: float = 0.02):
        rng = np.random.default_rng(seed)
        self.utterances = [said(f"u{i}", text) for i, text in enumerate(texts)]
        self.audio = [np.rint(32767 * np.clip(clip(text, rng, noise), -1, 1)).astype(np.int16) for text in texts]

    @property
    def texts(self):
        return [one.text for one in self.utterances]

    def waveforms(self, positions, seconds):
        batch = torch.zeros(len(positions), round(seconds * RATE))
        for row, place in enumerate(positions):
            batch[row, : len(self.audio[place])] = torch.from_numpy(self.audio[place].astype(np.float32)) / 32767
        return batch


def clip(text, rng, noise):
    t = np.arange(int(0.22 * RATE)) / RATE
    parts = [np.zeros(int(rng.uniform(0.02, 0.1) * RATE))]
    for word in text.split():
        k = WORDS.index(word)
        wave = np.sin(2 * np.pi * (300 + 350 * k) * t) + np.sin(2 * np.pi * (3000 - 300 * k) * t)
        parts += [0.2 * wave * np.hanning(len(t)), np.zeros(int(0.03 * RATE))]
    sound = np.concatenate([*parts, np.zeros(int(0.05 * RATE))])
    return sound + noise * rng.standard_normal(len(sound))


def sentences(count, *, seed=0, longest=4):
    """Sentences of one to `longest` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, longest + 1)))) for _ in range(count)]
