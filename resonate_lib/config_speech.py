"""The knobs of notebooks 09 and 10: what speech is made of, recognition, synthesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resonate_lib.knobs import Config, knob


@dataclass(frozen=True)
class SpeechConfig(Config):
    """Notebooks 09 and 10: the spoken corpus."""

    section: ClassVar[str] = "speech"
    train_utterances: int = knob(6000, low=4)
    validation_utterances: int = knob(300, low=2)
    test_utterances: int = knob(400, low=2)
    speech_folder: str = ""  # recordings in LibriSpeech's folders, or a caption file with audio_path and text; empty: espeak-ng
    longest: float = knob(10.0, above=0, high=30)  # seconds; longer recordings of `speech_folder` are left out


@dataclass(frozen=True)
class RecognitionConfig(Config):
    """Notebook 09: reinforcement of an audio language model that writes down what it hears."""

    section: ClassVar[str] = "recognition"
    steps: int = knob(40, low=1)  # rounds of sampling hypotheses and updating


@dataclass(frozen=True)
class SynthesisConfig(Config):
    """Notebook 10: reinforcement of a language model that speaks in tokens."""

    section: ClassVar[str] = "synthesis"
    steps: int = knob(40, low=1)  # rounds of sampling and updating
