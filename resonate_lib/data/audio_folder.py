"""Reading a folder of recordings with captions: a manifest of this suite, or anybody's caption file beside audio files.

Understood: JSON lines, CSV or TSV with `caption` (or `prompt`) and `audio_path` or `audio_id`, as AudioCaps gives them.
"""

import csv
import hashlib
import io
import json
from pathlib import Path

import torch

from resonate_lib import audio

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg")


def split_of(record: dict) -> str:
    """train, validation or test: the record's own `split`, else by a hash of the file's name (90, 5 and 5 %), so that several
    captions of one recording, and later additions to the folder, never move a recording from one to another."""
    if record.get("split"):
        return record["split"]
    place = int(hashlib.sha256(Path(record["audio_path"]).name.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(place, "train")


def load_manifest(path, audio_directory=None) -> list[dict]:
    """Records of a caption file, each with an absolute `audio_path`, a `caption` and `captions`, other columns kept.

    audio_directory: where relative paths and ids are looked up (default: the file's own folder).
    ValueError names the line and what is wrong; FileNotFoundError names the first missing recording.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no caption file at {path}: give a .jsonl, .csv or .tsv file with `audio_path` and `caption`")
    root = Path(audio_directory) if audio_directory else path.parent
    records = []
    for number, row in enumerate(rows(path), 1):
        caption = row.get("caption") or row.get("prompt")
        if not caption or not (row.get("audio_path") or row.get("audio_id")):
            raise ValueError(f"{path}, entry {number}: found columns {', '.join(map(str, row))}; it needs `caption` and "
                             "`audio_path` (a file) or `audio_id` (a file name without its ending)")
        several = row.get("captions") or [caption]
        records.append({**row, "caption": caption, "captions": [several] if isinstance(several, str) else several,
                        "audio_path": str(_find_audio(root, row, path, number))})
    if not records:
        raise ValueError(f"{path} holds no entries: write one line a recording")
    return records


def rows(path):
    """The entries of a caption or prompt file as dicts: JSON lines, CSV or TSV, UTF-8. ValueError says what is wrong where."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}: give a .jsonl, .csv or .tsv file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it again with that encoding") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error.msg}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: got {type(row).__name__}, one JSON object a line is needed")
                yield row
    elif path.suffix in (".csv", ".tsv"):
        yield from csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    else:
        raise ValueError(f"{path}: unknown kind of caption file {path.suffix!r}; use .jsonl, .csv or .tsv")


def _find_audio(root, row, path, number):
    name = row.get("audio_path") or row["audio_id"]
    candidates = [root / name] if row.get("audio_path") else [root / f"{name}{suffix}" for suffix in SUFFIXES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise FileNotFoundError(f"{path}, entry {number}: no recording at {candidates[0]}; set the folder that holds {name}")


def load_audio(records, *, sample_rate: int, seconds: float) -> torch.Tensor:
    """Waveforms (B, T) float32: channels averaged, resampled, cut or zero-padded to `seconds`."""
    return load_with_lengths(records, sample_rate=sample_rate, seconds=seconds)[0]


def load_with_lengths(records, *, sample_rate: int, seconds: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`load_audio`, and how many samples (B,) of each clip are the recording's. Differs from the published loader, which takes
    the first channel alone."""
    size = round(sample_rate * seconds)
    batch, lengths = torch.zeros(len(records), size), torch.zeros(len(records), dtype=torch.long)
    for place, record in enumerate(records):
        wave, rate = audio.read(record["audio_path"])
        wave = audio.resample(torch.as_tensor(wave), rate, sample_rate)[:size]
        batch[place, : len(wave)], lengths[place] = wave, len(wave)
    return batch, lengths


def check_files(records) -> int:
    """Compare every file with the sha256 its record states; returns how many were compared (a record may state none).

    ValueError names the first file that differs.
    """
    stated = [record for record in records if record.get("sha256")]
    for record in stated:
        found = hashlib.sha256(Path(record["audio_path"]).read_bytes()).hexdigest()
        if found != record["sha256"]:
            raise ValueError(f"{record['audio_path']} is not the file its manifest describes (sha256 {found[:12]}… instead of "
                             f"{record['sha256'][:12]}…): remove the corpus folder, and it is made again")
    return len(stated)
