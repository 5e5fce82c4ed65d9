"""Reading, writing and measuring sound: known levels, bad files, atomic writes."""

import os
import re

import numpy as np
import pytest
import soundfile
import torch

from resonate_lib import audio

RATE = 16000


def sine(frequency=997.0, amplitude=0.5, seconds=1.0, rate=RATE):
    return amplitude * torch.sin(2 * torch.pi * frequency * torch.arange(int(seconds * rate)) / rate)


@pytest.mark.parametrize(("suffix", "tolerance"), [("flac", 1 / 32767), ("wav", 1 / 32767), ("mp3", 0.03)])
def test_written_and_read_back(tmp_path, suffix, tolerance):
    path = audio.write(tmp_path / "new" / f"a.{suffix}", sine(), RATE)
    back, rate = audio.read(path)
    assert rate == RATE and back.dtype == torch.float32 and back.ndim == 1
    start = 2000  # an mp3 fades in over its first frames, and its encoder scales by 0.95
    length = min(len(back), RATE)
    assert torch.allclose(back[start:length], sine()[start:length], atol=tolerance)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_channels_are_averaged(tmp_path):
    soundfile.write(
        tmp_path / "s.wav", np.stack([np.full(100, 0.5), np.full(100, -0.25)], axis=1), RATE, subtype="FLOAT"
    )
    assert torch.allclose(audio.read(tmp_path / "s.wav")[0], torch.full((100,), 0.125))


def _write(path, data):
    path.write_bytes(data)
    return path


def test_bad_files_name_the_fix_in_one_line(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    flac = audio.write(tmp_path / "whole.flac", 0.1 * torch.randn(RATE), RATE).read_bytes()
    wav = audio.write(tmp_path / "whole.wav", 0.1 * torch.randn(RATE), RATE).read_bytes()
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(10, np.nan), RATE, subtype="FLOAT")
    cases = {
        "no such audio file; correct the path": tmp_path / "none.wav",
        "no such audio file": tmp_path,
        "0 bytes.*copy": _write(tmp_path / "empty.flac", b""),
        "not a readable audio file": _write(tmp_path / "noise.flac", noise),
        "not a readable.*copy the file again": _write(tmp_path / "cut.flac", flac[: len(flac) // 2]),
        "cut off.*copy": _write(tmp_path / "cut.wav", wav[: len(wav) // 2]),
        "no samples": tmp_path / "zero.wav",
        "NaN": tmp_path / "nan.wav",
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            audio.read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_write_refuses_what_is_no_sound(tmp_path):
    for waveform, message in (
        (torch.tensor([0.0, float("nan")]), "NaN"),
        (torch.tensor([float("inf")]), "infinite"),
        (torch.zeros(2, 5), "mono"),
        (torch.zeros(0), "T > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            audio.write(tmp_path / "a.flac", waveform, RATE)
    with pytest.raises(ValueError, match=r"use \.flac, \.wav or \.mp3"):
        audio.write(tmp_path / "a.ogg", sine(), RATE)
    with pytest.raises(ValueError, match="mp3 allows"):
        audio.write(tmp_path / "a.mp3", sine(), 17000)
    assert not list(tmp_path.iterdir())


def test_clipping_is_clamped_and_reported(tmp_path):
    with pytest.warns(UserWarning, match="2 of 4 samples beyond"):
        audio.write(tmp_path / "a.wav", torch.tensor([0.0, 1.5, -2.0, 0.5]), RATE)
    assert torch.allclose(audio.read(tmp_path / "a.wav")[0], torch.tensor([0.0, 1.0, -1.0, 0.5]), atol=1e-4)


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot be written .*free space or choose"):
        audio.write(tmp_path / "file" / "a.wav", sine(), RATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        audio.write(tmp_path / "a.wav", sine(), RATE)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_loudness_of_a_known_sine():
    # BS.1770: a full-scale 997 Hz sine in one channel is -3.01 LUFS
    for amplitude, expected in ((1.0, -3.01), (0.1, -23.01), (2.0, 3.01)):
        found = audio.loudness(sine(amplitude=amplitude, seconds=3, rate=48000), 48000)
        assert found == pytest.approx(expected, abs=0.06)
    assert audio.loudness(sine(amplitude=0.1, seconds=3), RATE) == pytest.approx(-23.01, abs=0.2)
    assert np.isnan(audio.loudness(torch.zeros(RATE), RATE))
    with pytest.raises(ValueError, match=r"0\.300 s.*at least 0\.4 s"):
        audio.loudness(sine(seconds=0.3), RATE)


def test_peak_silence_and_clipping():
    assert audio.peak_dbfs(torch.tensor([0.1, -0.5])) == pytest.approx(-6.0206, abs=1e-4)
    assert audio.peak_dbfs(torch.zeros(3)) == -np.inf
    assert audio.is_silent(torch.full((10,), 0.003)) and not audio.is_silent(torch.full((10,), 0.0032))
    assert audio.is_clipping(torch.tensor([0.0, 0.999, -1.0, 1.2, 0.0]))
    assert not audio.is_clipping(torch.tensor([1.0, 1.0, 0.9, 1.0, 1.0])) and not audio.is_clipping(torch.ones(2))


def test_common_gain_keeps_differences():
    clips = [sine(amplitude=0.5), sine(amplitude=0.05)]
    gain = audio.common_gain(clips)
    assert gain * float(clips[0].max()) == pytest.approx(10 ** (-1 / 20), rel=1e-4)
    assert audio.common_gain([torch.zeros(5)]) == 1.0
    assert audio.common_gain([torch.full((5,), 1e-5)]) == pytest.approx(10**1.5)


def test_any_id_may_stand_in_a_file_name():
    assert audio.file_stem("accuracy_test_0001") == "accuracy_test_0001" and audio.file_stem(7) == "7"
    strange = ["../x", "a/b", "a b", "a-b", "/etc/passwd", "C:\\x", "x\0", "..", "x" * 300, "x" * 301, "é"]
    stems = [audio.file_stem(identity) for identity in strange]
    assert len(set(stems)) == len(strange) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,89}", stem) for stem in stems)


def test_resample_keeps_pitch_and_level():
    back = audio.resample(audio.resample(sine(440), RATE, 44100), 44100, RATE)
    assert torch.allclose(back[500:-500], sine(440)[500:-500], atol=2e-3)
    assert audio.resample(sine(), RATE, RATE) is not None and len(audio.resample(sine(), RATE, 8000)) == 8000
