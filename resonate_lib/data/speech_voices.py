"""How a sentence becomes sound: espeak-ng in this process, then a room, noise and dither, all from the utterance's own seed.

What is said and by whom is drawn in `speech`. espeak-ng (GPL-3) is an optional package, see requirements-speech.txt.
"""

from __future__ import annotations

import _ctypes
import ctypes
import difflib
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.signal import fftconvolve, resample_poly
from torch import Tensor

if TYPE_CHECKING:
    from resonate_lib.data.speech import Utterance

SAMPLE_RATE = 16000
# Variants with breath (f2, f3, f5 and others) are left out: espeak-ng's breath differs from call to call.
TRAIN_VOICES = ("en-us", "en-us+f1", "en-us+steph", "en-us+m2", "en-us+m3", "en-us+m6", "gmw/en+f4", "en-us-nyc+m7")
TEST_VOICES = ("en-us+f4", "en-us+linda", "en-us+m4", "en-us+m5")  # no utterance of training or validation has them
VOICES = TRAIN_VOICES + TEST_VOICES
SPEECH_DBFS = -23.0  # active level of a clip, within 3 dB; the noise of a silent clip is told against it
DITHER = 10 ** (-80 / 20)  # deviation: a digital zero is heard as words by some recognisers
RATES, PITCHES = (80, 300), (0, 99)  # words per minute, and espeak's scale: what it says clearly

RATE, PITCH = 1, 3  # espeak_PARAMETER
SYNCHRONOUS, DO_NOT_EXIT, UTF8 = 2, 0x8000, 1
Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_one_at_a_time = threading.Lock()  # the library has one state for the whole process


def need(package: str):
    """The optional speech package of this name. ImportError, one line, where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"{package} is not installed: pip install -r requirements-speech.txt") from None


def speak(utterances: Sequence[Utterance], *, sample_rate: int = SAMPLE_RATE) -> list[Tensor]:
    """Each utterance as a waveform (T,) float32 in [-1, 1], about -23 dBFS: the voice, its room, noise, dither.

    The same utterance gives the same samples whatever is spoken before it.
    Raises ValueError for a voice that is none of VOICES (the nearest is named), for empty text (other than of kind "silence"),
    text that is not ASCII or has no word, and rates or pitches out of range; ImportError where espeak-ng is not installed.
    """
    for utterance in utterances:
        check(utterance)
    return [torch.from_numpy(render(utterance, sample_rate)) for utterance in utterances]


def check(utterance: Utterance) -> None:
    """ValueError, one line, for an utterance that cannot be spoken."""
    name, text = utterance.id, utterance.text
    if (utterance.kind == "silence") != (not text.strip()):
        raise ValueError(f"{name}: text {text!r} with kind={utterance.kind!r}: a silence has no text, anything else has one")
    if not text.isascii():
        odd = next(c for c in text if not c.isascii())
        raise ValueError(f"{name}: {odd!r} in {text!r} is not ASCII, and English voices guess at it: use English letters")
    if text.strip() and not any(c.isalnum() for c in text):
        raise ValueError(f"{name}: nothing to say in {text!r}: write words")
    if utterance.voice not in VOICES:
        near = difflib.get_close_matches(utterance.voice, VOICES, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name}: no voice {utterance.voice!r} (nearest: {near!r}); use one of {', '.join(VOICES)}")
    for what, value, (low, high) in (("rate", utterance.rate, RATES), ("pitch", utterance.pitch, PITCHES)):
        if not low <= value <= high:
            raise ValueError(f"{name}: {what}={value}: use {low} to {high}")


def render(utterance: Utterance, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """One checked utterance as (T,) float32 at sample_rate.

    Utterances without noise_db are clean. Of the others every second is in a room; the noise is white, pink or hum.
    """
    rng = np.random.default_rng(utterance.seed)
    level = 10 ** ((SPEECH_DBFS + rng.uniform(-3, 3)) / 20)
    if utterance.kind == "silence":
        voice = np.zeros(int(rng.uniform(0.8, 4.0) * sample_rate))
    else:
        voice = _margins(say(utterance, sample_rate), rng, sample_rate)
        voice *= level / _active_rms(voice)
    if utterance.noise_db is not None:
        if rng.random() < 0.5:
            voice = _room(voice, rng, sample_rate)
        voice = voice + level * 10 ** (-utterance.noise_db / 20) * _noise(len(voice), rng, sample_rate)
    voice = voice + DITHER * rng.standard_normal(len(voice))
    peak = np.abs(voice).max()
    return (voice * min(1.0, 0.95 / peak)).astype(np.float32)


def _margins(voice, rng, sample_rate):
    """The voice with 0.05 to 0.3 s of silence on both sides."""
    before, after = (int(seconds * sample_rate) for seconds in rng.uniform(0.05, 0.3, 2))
    return np.pad(voice, (before, after))


def _active_rms(voice):
    """Root mean square over the samples within 30 dB of the loudest: pauses do not count."""
    active = voice[np.abs(voice) > np.abs(voice).max() * 10 ** (-30 / 20)]
    return float(np.sqrt(np.mean(active**2)))


def _room(voice, rng, sample_rate):
    """Reverberation: noise that decays by 60 dB in 0.15 to 0.5 s, 6 to 14 dB under the direct sound."""
    seconds = rng.uniform(0.15, 0.5)
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(t)) * 10 ** (-3 * t / seconds)
    tail *= 10 ** (-rng.uniform(6, 14) / 20) / np.sqrt(np.sum(tail**2))
    tail[0] += 1.0
    return fftconvolve(voice, tail)[: len(voice)]


def _noise(size, rng, sample_rate):
    """(size,) noise of unit deviation: white, pink (power 1/f), or mains hum with harmonics under pink noise."""
    kind, white = rng.integers(3), rng.standard_normal(size)
    if kind == 0:
        return white
    spectrum = np.fft.rfft(white)
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), size)
    if kind == 2:
        t, base = np.arange(size) / sample_rate, rng.uniform(48, 62)
        hum = sum(np.sin(2 * np.pi * base * k * t + rng.uniform(0, 2 * np.pi)) / k for k in range(1, 8))
        pink = pink / pink.std() + 2 * hum / hum.std()
    return pink / pink.std()


# --- espeak-ng --------------------------------------------------------------------------------------------------------


@cache
def _polyphase(sample_rate: int, target: int) -> tuple[int, int]:
    divisor = int(np.gcd(sample_rate, target))
    return target // divisor, sample_rate // divisor


def say(utterance: Utterance, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """The bare voice (T,) float64 at sample_rate.

    espeak-ng keeps the phase of its voices' flutter from one utterance to the next, and no call resets it: the library is
    loaded anew for each (1.5 ms), so that an utterance depends on nothing before it.
    """
    with _one_at_a_time:
        pieces, rate = _synthesise(utterance)
    if not pieces:
        raise ValueError(f"{utterance.id}: espeak-ng has nothing to say for {utterance.text!r}: write words")
    up, down = _polyphase(rate, sample_rate)
    return resample_poly(np.concatenate(pieces) / 32768.0, up, down)


def _synthesise(utterance):
    """int16 pieces and their rate in Hz."""
    loader = need("espeakng_loader")
    library, pieces = ctypes.CDLL(loader.get_library_path()), []

    @Callback
    def collect(samples, count, _):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, str(loader.get_data_path()).encode(), DO_NOT_EXIT)
        if rate <= 0:
            raise ValueError(f"espeak-ng does not start with the data in {loader.get_data_path()}: install the package again")
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(utterance.voice.encode()):
            raise ValueError(f"{utterance.id}: this espeak-ng has no voice {utterance.voice!r}: install requirements-speech.txt")
        library.espeak_SetParameter(RATE, utterance.rate, 0)
        library.espeak_SetParameter(PITCH, utterance.pitch, 0)
        text = utterance.text.encode("ascii") + b"\0"
        library.espeak_Synth(text, ctypes.c_size_t(len(text)), 0, 1, 0, UTF8, None, None)
        library.espeak_Terminate()
    finally:
        getattr(_ctypes, "dlclose", getattr(_ctypes, "FreeLibrary", None))(library._handle)
    return pieces, rate
