"""Sound in files and how loud it is: read, write, resample, loudness, peak, silence, clipping, a common gain.

This is the only place where audio files are read or written. Players and pages are in `listen.py`, spectrograms in
`plots.py`. Files go through soundfile (torchaudio's own reader and writer need torchcodec); loudness is ITU-R BS.1770
as torchaudio computes it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

FORMATS = {".flac": "FLAC", ".wav": "WAV", ".mp3": "MP3"}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
SILENCE_DBFS = -50.0
CLIPPING_LEVEL = 0.999
CLIPPING_RUN = 3
MAX_GAIN = 10 ** (30 / 20)  # a comparison of near-silent clips must not be blown up to full-scale noise


def file_stem(identity) -> str:
    """A prompt's id, which may hold anything, as a part of a file's name: letters, digits, _ and - stay, other runs become one -.

    At most 80 of them. What had to change ends in 8 hex of the whole id, so that `a/b` and `a b` are two files.
    """
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", str(identity))[:80]
    return safe if safe == str(identity) else f"{safe}-{hashlib.sha256(str(identity).encode()).hexdigest()[:8]}"


def read(path: str | os.PathLike) -> tuple[torch.Tensor, int]:
    """Read an audio file as mono.

    Returns the waveform (T,) float32, channels averaged, and its sample rate in Hz.
    Raises ValueError, one line naming the fix, for a file that is missing, empty, cut off, unreadable or holds NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such audio file; correct the path (in a manifest: audio_path) or restore the file"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the audio file is empty (0 bytes); copy or download it again, or remove its entry")
    try:
        frames = soundfile.info(str(path)).frames
        samples, sample_rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or "cannot be decoded"
        raise ValueError(
            f"{path}: not a readable audio file ({reason}); use flac, wav or mp3, or copy the file again"
        ) from None
    if samples.shape[0] == 0:
        raise ValueError(f"{path}: the audio file holds no samples; record or copy it again, or remove its entry")
    # An mp3's header counts the encoder's padding in, a few frames of 1,152 samples.
    padding = 4 * 1152 if path.suffix.lower() == ".mp3" else 0
    if samples.shape[0] < 0.98 * frames - padding or _wav_cut_off(path):
        raise ValueError(f"{path}: the audio file is cut off before its stated end; copy or download it again")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: the audio holds NaN or infinite samples; export it again")
    return torch.from_numpy(np.ascontiguousarray(samples.mean(axis=1))), int(sample_rate)


def _wav_cut_off(path: Path) -> bool:
    """Whether a WAV file is shorter than its header says: libsndfile reads what is left without a word."""
    with open(path, "rb") as handle:
        header = handle.read(8)
    if header[:4] != b"RIFF":
        return False
    stated = int.from_bytes(header[4:8], "little")
    return 0 < stated < 0xFFFFFFFF and stated + 8 > path.stat().st_size + 1  # an odd last chunk may lack its pad byte


def write(path: str | os.PathLike, waveform, sample_rate: int) -> Path:
    """Write a mono waveform (T,) to .flac (16 bit), .wav (16 bit) or .mp3, by the suffix; parent folders are made.

    The file appears whole or not at all. Samples beyond ±1 are clamped and a warning says how many.
    Raises ValueError for another suffix, shape or rate and for non-finite samples; OSError when the folder cannot be
    written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: suffix {path.suffix!r} is not an audio format; use .flac, .wav or .mp3")
    samples = _samples(waveform)
    over = int((np.abs(samples) > 1).sum())
    if over:
        warnings.warn(
            f"{path}: {over} of {samples.size} samples beyond ±1 were clamped; lower the gain to avoid clipping",
            stacklevel=2,
        )
    write_bytes(path, encode(samples, sample_rate, path.suffix.lower()))
    return path


def encode(waveform, sample_rate: int, suffix: str = ".mp3", *, comment: str = "") -> bytes:
    """The bytes of an audio file with this mono waveform (T,), clamped to ±1. suffix: .flac, .wav or .mp3; comment: of its
    metadata."""
    samples = np.clip(_samples(waveform), -1.0, 1.0)
    if suffix == ".mp3" and sample_rate not in MP3_RATES:
        raise ValueError(f"sample_rate={sample_rate}: mp3 allows {MP3_RATES}; use audio.resample first, or write flac")
    buffer = io.BytesIO()
    options = {"subtype": "PCM_16"}
    if suffix == ".mp3":  # about 64 kbit/s at 16 kHz; the default, half of that, is heard on noisy events
        options = {"subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.6}
    with soundfile.SoundFile(buffer, "w", int(sample_rate), 1, format=FORMATS[suffix], **options) as file:
        if comment:
            file.comment = comment  # before the samples: the header is written with the first of them
        file.write(samples)
    return buffer.getvalue()


def decode(data: bytes) -> tuple[torch.Tensor, int, str]:
    """The mono waveform (T,) float32, sample rate and comment of what `encode` gave. ValueError where it cannot be read; a file
    cut off between two frames can, and is shorter."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            return torch.from_numpy(file.read(dtype="float32")), file.samplerate, file.comment
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"not readable as audio ({' '.join(str(error).split())}); make it again") from None


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path` at once: a temporary file in the same folder, then a rename. OSError names the fix."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes it private to its owner
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise OSError(
            f"{path}: cannot be written ({error.strerror}); free space or choose a folder you may write to"
        ) from None


def _samples(waveform) -> np.ndarray:
    samples = torch.as_tensor(waveform).detach().to("cpu", torch.float32).numpy()
    if samples.ndim != 1 or samples.size == 0:
        raise ValueError(f"waveform of shape {samples.shape}: one mono clip (T,) with T > 0 is allowed; pass audio[i]")
    if not np.isfinite(samples).all():
        raise ValueError("waveform holds NaN or infinite samples; look for the step that made them before writing")
    return samples


def resample(waveform, from_rate: int, to_rate: int) -> torch.Tensor:
    """Resample (..., T) from one rate to another, both in Hz; equal rates return the input."""
    waveform = torch.as_tensor(waveform)
    if from_rate == to_rate:
        return waveform
    return torchaudio.functional.resample(waveform, int(from_rate), int(to_rate))


def loudness(waveform, sample_rate: int) -> float:
    """Integrated loudness of one clip (T,) in LUFS (ITU-R BS.1770); nan for silence.

    torchaudio clamps its filters at ±1, which puts loud clips up to 0.3 LU low: they are scaled down to be measured.

    Raises ValueError under 0.4 s: the measure gates blocks of that length.
    """
    waveform = torch.as_tensor(waveform).detach().to("cpu", torch.float32)
    seconds = waveform.shape[-1] / sample_rate
    if seconds < 0.4:
        raise ValueError(f"clip of {seconds:.3f} s: loudness needs at least 0.4 s; pad the clip or measure its peak")
    if not waveform.any():
        return float("nan")
    scale = max(1.0, float(waveform.abs().max()) / 0.25)
    value = float(torchaudio.functional.loudness(waveform.reshape(1, -1) / scale, int(sample_rate)))
    return value + 20 * float(np.log10(scale)) if np.isfinite(value) else float("nan")


def peak_dbfs(waveform) -> float:
    """The highest absolute sample in dB relative to full scale (1.0); -inf for digital silence."""
    peak = float(torch.as_tensor(waveform).detach().abs().max())
    return 20 * float(np.log10(peak)) if peak > 0 else float("-inf")


def is_silent(waveform) -> bool:
    """Whether the peak lies under -50 dBFS."""
    return peak_dbfs(waveform) < SILENCE_DBFS


def is_clipping(waveform) -> bool:
    """Whether three neighbouring samples of (T,) reach 0.999 in absolute value; look at it before any clamp."""
    full = (torch.as_tensor(waveform).detach().abs() >= CLIPPING_LEVEL).float()
    if full.shape[-1] < CLIPPING_RUN:
        return False
    return bool((full.unfold(-1, CLIPPING_RUN, 1).sum(-1) == CLIPPING_RUN).any())


def common_gain(waveforms: Sequence, *, peak: float = 10 ** (-1 / 20)) -> float:
    """One linear gain for all clips of a comparison: the loudest sample of all comes to `peak` (default -1 dBFS).

    Multiplying every clip by it keeps their differences in loudness. At most 30 dB; 1.0 when all are digital silence.
    """
    highest = max((float(torch.as_tensor(w).abs().max()) for w in waveforms), default=0.0)
    return min(peak / highest, MAX_GAIN) if highest > 0 else 1.0
