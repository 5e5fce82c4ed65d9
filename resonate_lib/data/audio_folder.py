"""Reading a folder of recordings with captions: a manifest of this suite, or anybody's caption file beside audio files.

Understood: JSON lines, CSV or TSV with `caption` (or `prompt`) and `audio_path` or `audio_id`, as AudioCaps gives them.
"""

import csv
import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from resonate_lib import audio

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg")
READERS = 8  # threads that read one batch: decoding and resampling leave Python's lock alone
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
               "test": ("test", "testing")}  # fmt: skip


def split_of(record: dict) -> str:
    """train, validation or test: the record's own `split` (SPLIT_NAMES, in any case), else by a hash of the file's name (90, 5 and
    5 %), so that later additions to the folder never move a recording from one to another. ValueError for another name."""
    stated = str(record.get("split") or "").strip()
    for split, names in SPLIT_NAMES.items():
        if stated.lower() in names:
            return split
    if stated:
        allowed = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise ValueError(f"{record['audio_path']}: unknown split {stated!r}; use {allowed}, or leave it empty")
    place = int(hashlib.sha256(Path(record["audio_path"]).name.encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "validation"}.get(place, "train")


def load_manifest(path, audio_directory=None) -> list[dict]:
    """Records of a caption file, one a recording: its absolute `audio_path`, `caption`, `captions`, and the file's other columns.

    Several entries of one recording, such as AudioCaps' five captions a test clip, are one record: the first entry's, with the
    captions of all.
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
        texts = (caption, row.get("audio_path") or row["audio_id"], *([several] if isinstance(several, str) else several))
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}, entry {number}: captions and file names are texts; write them in quotes")
        records.append({**row, "caption": caption, "captions": [several] if isinstance(several, str) else several,
                        "audio_path": str(_find_audio(root, row, path, number))})
    if not records:
        raise ValueError(f"{path} holds no entries: write one line a recording")
    return _by_recording(records, path)


def _by_recording(records, path):
    """One record for each audio file, in the order of their first entries."""
    found = {}
    for number, record in enumerate(records, 1):
        first = found.setdefault(record["audio_path"], record)
        if first is record:
            continue
        if split_of(first) != split_of(record):
            raise ValueError(f"{path}, entry {number}: {record['audio_path']} is in {split_of(record)} here and in "
                             f"{split_of(first)} before; give all entries of a recording one split")
        first["captions"] = list(dict.fromkeys(first["captions"] + record["captions"]))
    return list(found.values())


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
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        for number, row in enumerate(table, 1):
            if None in row:
                raise ValueError(f"{path}, entry {number} has more cells than there are columns: put texts that hold the delimiter "
                                 'in quotes ("a dog barks, followed by rain")')
            yield row
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
    the first channel alone. Files are read by several threads; of several that are bad the first one's error is raised."""
    size = round(sample_rate * seconds)
    batch, lengths = torch.zeros(len(records), size), torch.zeros(len(records), dtype=torch.long)

    def read(place):
        wave, rate = audio.read(records[place]["audio_path"])
        wave = audio.resample(torch.as_tensor(wave), rate, sample_rate)[:size]
        batch[place, : len(wave)], lengths[place] = wave, len(wave)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(len(records))))
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
