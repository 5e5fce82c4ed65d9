"""Recordings with transcripts from disk, as the same corpus that `speech` draws: LibriSpeech's folders, or a caption file.

Understood: `<speaker>-<chapter>.trans.txt` beside FLAC files, as LibriSpeech has them, and JSON lines, CSV or TSV with `audio_path`
and `text`. Sound is read when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from resonate_lib import audio
from resonate_lib.data import audio_folder
from resonate_lib.data.corpus import to_int16
from resonate_lib.data.speech import SpeechCorpus, Utterance
from resonate_lib.data.speech_voices import SAMPLE_RATE


class Recording:
    """An audio file as numpy takes an array: (T,) int16 at 16 kHz, read anew each time; its length is known from the header."""

    def __init__(self, path: Path):
        self.path = path
        try:
            header = soundfile.info(str(path))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise ValueError(f"{path}: not a readable audio file ({' '.join(str(error).split())}); copy the file again") from None
        self.samples = math.ceil(header.frames * SAMPLE_RATE / header.samplerate)

    def __len__(self):
        return self.samples

    def __array__(self, dtype=None, copy=None):
        wave, rate = audio.read(self.path)
        return to_int16(audio.resample(wave, rate, SAMPLE_RATE).numpy()).astype(dtype or np.int16)


def read_folder(path, split: str, *, longest: float) -> SpeechCorpus:
    """The recordings of a split, in the order of their names; those longer than `longest` seconds are left out, and counted.

    path: a folder anywhere above `*.trans.txt` files, or a .jsonl, .csv or .tsv file. Splits: of folders called train…, dev… or
    test…, of a column `split`, else by a hash of the speaker's folder or the file's name. Texts are put in lower case; an empty one
    is a silence. ValueError and FileNotFoundError, one line each, say what is missing where.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        rows = _transcripts(path)
    elif path.is_file():
        rows = _listed(path)
    else:
        raise FileNotFoundError(f"no folder or file at {path}: give a LibriSpeech folder, or a .jsonl, .csv or .tsv file")
    clips, utterances, left = [], [], 0
    for row in sorted((row for row in rows if row["split"] == split), key=lambda row: row["id"]):
        if not row["audio"].is_file():
            raise FileNotFoundError(f"{row['source']}: no recording at {row['audio']}; restore the file or remove its line")
        clip = Recording(row["audio"])
        if len(clip) > longest * SAMPLE_RATE:
            left += 1
            continue
        clips.append(clip)
        text = " ".join(row["text"].lower().split())
        utterances.append(Utterance(row["id"], text, "recording" if text else "silence", 0, row["voice"], 0, 0, (), None, 0))
    if left:
        print(f"{path}: {left} recordings of {split} are longer than {longest:g} s and left out", flush=True)
    if not clips:
        raise ValueError(f"{path}: no recordings of {split} of {longest:g} s or less; check folder names, `split`, longest")
    return SpeechCorpus(clips, utterances)


def _transcripts(folder: Path) -> Iterator[dict]:
    """The lines of all `*.trans.txt`: an id, which is the file's name, a blank, the words."""
    files = sorted(folder.rglob("*.trans.txt"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.trans.txt under it; give a LibriSpeech folder, or a .jsonl, .csv or .tsv file")
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            name, _, text = line.strip().partition(" ")
            if name:
                yield {"id": name, "text": text, "audio": file.parent / f"{name}.flac", "source": file,
                       "voice": name.partition("-")[0], "split": _split_of(file.relative_to(folder.parent), name)}


def _split_of(path: Path, name: str) -> str:
    """By the first folder whose name begins as a split's, else by a hash of the speaker: nobody is heard in two splits."""
    stated = (part.partition("-")[0].lower() for part in path.parts[:-1])
    known = [part for part in stated if part in ("train", "dev", "test")]
    return audio_folder.split_of({"audio_path": name.partition("-")[0], "split": known[0] if known else ""})


def _listed(file: Path) -> Iterator[dict]:
    """The entries of a caption file with `audio_path` (absolute, or from the file's folder) and `text`."""
    for number, row in enumerate(audio_folder.rows(file), 1):
        if row.get("audio_path") is None or row.get("text") is None:
            raise ValueError(f"{file}, entry {number}: found columns {', '.join(map(str, row))}; it needs `audio_path` and `text`")
        place = file.parent / row["audio_path"]
        yield {"id": str(row.get("id") or row["audio_path"]), "text": row["text"], "audio": place, "source": file,
               "voice": str(row.get("voice") or row.get("speaker") or ""), "split": audio_folder.split_of(row)}
