"""Spoken utterances with exact transcripts: which are drawn for a split, and the corpus of them held in memory.

The words come from `speech_grammar`, the sound from `speech_voices`; recordings of others are read by `speech_folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resonate_lib.config_speech import SpeechConfig
from resonate_lib.data import speech_grammar
from resonate_lib.data.corpus import to_int16
from resonate_lib.data.scenes import SPLITS
from resonate_lib.data.speech_grammar import JOINS, TEMPLATES, jsgf, keyword_weights, vocabulary
from resonate_lib.data.speech_voices import SAMPLE_RATE, TEST_VOICES, TRAIN_VOICES, speak
from resonate_lib.progress import told

__all__ = ["KINDS", "SpeechCorpus", "Utterance", "draw_utterances", "jsgf", "keyword_weights", "open_speech", "speak", "vocabulary"]

KINDS = {"command": 0.28, "number": 0.2, "name": 0.16, "rare": 0.16, "long": 0.12, "silence": 0.08}  # kind -> share of a corpus
RATES = ((130, 160), (140, 180), (150, 200), (160, 220))  # words per minute by level
NOISE = (None, (20, 30), (10, 20), (5, 12))  # dB that the voice is above the noise, by level; None: clean
LONGEST = 10.0  # seconds that long utterances are drawn for, by their rate; a slow voice takes a little more for one in thousands
ORDER_SEED = 500  # of recordings: their names would put one speaker's together
EDITION = 1  # of what is drawn and how it sounds: a corpus in the cache of another edition is not used


@dataclass(frozen=True)
class Utterance:
    """What is said, by whom, and how hard it is to hear."""

    id: str
    text: str  # the exact transcript: lower case, no punctuation; "" for a silence
    kind: str  # one of KINDS, or "recording" for what comes from a folder
    level: int  # difficulty 0 to 3
    voice: str
    rate: int  # words per minute
    pitch: int  # 0 to 99
    keywords: tuple[str, ...]  # the words that could not be guessed from the rest of the sentence
    noise_db: float | None  # the voice over the noise; None: clean
    seed: int  # of margins, level, room, noise and dither

    def as_dict(self) -> dict:
        """Plain values, as `of` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: dict) -> Utterance:
        """From what `as_dict` gave; other keys are left aside."""
        values = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"keywords": tuple(values["keywords"])})


def split_of_sentence(sentence: str) -> str:
    """train, validation or test (8, 1 and 1 of ten) by a hash of the words, so that no sentence is in two splits."""
    bucket = int(hashlib.sha256(sentence.encode()).hexdigest(), 16) % 10
    return speech_grammar.HELD_OUT.get(bucket, "train")


def draw_utterances(
    count: int, *, split: str, seed: int, kinds: Sequence[str] | None = None, voices: Sequence[str] | None = None
) -> list[Utterance]:
    """`count` utterances of a split; the first n of them are what count=n draws.

    kinds: which of KINDS, in their shares (None: all). voices: instead of TRAIN_VOICES for training and validation, and of those
    and TEST_VOICES, half each, for test. Clauses of long utterances are sentences of the split too. Rare words follow a long
    tail in training and are as likely each in validation and test. ValueError for an unknown split, kind or a count under 1.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count={count}: draw at least one utterance")
    kinds = tuple(KINDS if kinds is None else kinds)
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds={kinds}: use some of {', '.join(KINDS)}")
    return [_draw(index, split, seed, kinds, voices) for index in range(count)]


def _draw(index, split, seed, kinds, voices) -> Utterance:
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    shares = np.array([KINDS[kind] for kind in kinds])
    kind, level = kinds[rng.choice(len(kinds), p=shares / shares.sum())], int(rng.integers(4))
    if voices is None:
        voices = TEST_VOICES if split == "test" and rng.random() < 0.5 else TRAIN_VOICES
    voice, rate, pitch = voices[rng.integers(len(voices))], int(rng.integers(*RATES[level])), int(rng.integers(35, 66))
    text, keywords = "", ()
    if kind == "long":
        text, keywords = _join(level, rate, split, rng)
    elif kind != "silence":
        text, keywords = _sentence(kind, level, split, rng)
    noise = round(float(rng.uniform(*NOISE[level])), 1) if NOISE[level] else None
    name, own_seed = f"{split}_{seed}_{index:06d}", int(rng.integers(2**31))
    return Utterance(name, text, kind, level, voice, rate, pitch, keywords, noise, own_seed)


def _sentence(kind, level, split, rng):
    """A sentence of the split and its keywords."""
    while True:
        templates = TEMPLATES[kind][level]
        sentence, keywords = speech_grammar.fill(templates[rng.integers(len(templates))], rng, tail=split == "train")
        if split_of_sentence(sentence) == split:
            return sentence, keywords


def _join(level, rate, split, rng):
    """Three to six clauses (level + 3) of middling sentences, as many as are said within LONGEST."""
    clauses, found = [], ()
    for _ in range(level + 3):
        kind = list(TEMPLATES)[rng.integers(len(TEMPLATES))]
        sentence, keywords = _sentence(kind, int(rng.integers(1, 3)), split, rng)
        join = [JOINS[rng.integers(len(JOINS))]] if clauses else []
        if sum(len(part.split()) for part in [*clauses, *join, sentence]) > rate / 60 * LONGEST * 1.05:
            break
        clauses, found = clauses + join + [sentence], found + keywords
    return " ".join(clauses), found


class SpeechCorpus:
    """Utterances and their sound: audio is a list of (T,) int16 arrays at 16 kHz, or of what numpy reads as such when asked."""

    def __init__(self, audio: Sequence[np.ndarray], utterances: Sequence[Utterance], sample_rate: int = SAMPLE_RATE):
        if len(audio) != len(utterances):
            raise ValueError(f"{len(audio)} clips for {len(utterances)} utterances: give one for each")
        self.audio, self.utterances, self.sample_rate = audio, list(utterances), sample_rate

    def __len__(self):
        return len(self.utterances)

    @property
    def texts(self) -> list[str]:
        """The transcripts, in order."""
        return [utterance.text for utterance in self.utterances]

    def select(self, positions: Sequence[int]) -> SpeechCorpus:
        """The corpus of these positions, in their order."""
        return SpeechCorpus([self.audio[p] for p in positions], [self.utterances[p] for p in positions], self.sample_rate)

    def seconds(self, positions: Sequence[int] | None = None) -> Tensor:
        """(B,) float32: how long each clip is."""
        positions = range(len(self)) if positions is None else positions
        return torch.tensor([len(self.audio[p]) / self.sample_rate for p in positions])

    def waveforms(self, positions: Sequence[int], seconds: float) -> Tensor:
        """(B, T) float32 in [-1, 1], T = 16,000 · seconds, zero-padded at the end.

        ValueError for a clip that is longer: a transcript of more than is heard would teach to invent the rest.
        """
        batch = torch.zeros(len(positions), round(seconds * self.sample_rate))
        for row, position in enumerate(positions):
            clip = self.audio[position]
            if len(clip) > batch.shape[1]:
                length = len(clip) / self.sample_rate
                raise ValueError(f"{self.utterances[position].id}: {length:.2f} s, more than seconds={seconds:g}: allow more, or "
                                 "leave long utterances out")
            batch[row, : len(clip)] = torch.from_numpy(np.asarray(clip, dtype=np.float32)) / 32767.0
        return batch


def open_speech(
    config: SpeechConfig, split: str, *, seed: int, cache, count: int | None = None, kinds: Sequence[str] | None = None,
    last: bool = False,
) -> SpeechCorpus:  # fmt: skip
    """The split's corpus: recordings of `config.speech_folder`, or utterances spoken once into `cache`/speech and read from there.

    count, kinds: other than the configuration's (it has no count for validation) and all. Of recordings, which are all of one
    kind, None are all; they come in an order that one seed draws for good, of which these are the first or, with `last`, the last.
    Errors as in `draw_utterances`, `speak` and `speech_folder.read_folder`.
    """
    if config.speech_folder:
        from resonate_lib.data import speech_folder  # which builds on this file

        corpus = speech_folder.read_folder(config.speech_folder, split, longest=config.longest)
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(ORDER_SEED)).tolist()
        size = min(len(order), len(order) if count is None else count)
        return corpus.select(order[len(order) - size :] if last else order[:size])
    count = getattr(config, f"{split}_utterances") if count is None else count
    utterances = draw_utterances(count, split=split, seed=seed, kinds=kinds)
    told = json.dumps([EDITION, [utterance.as_dict() for utterance in utterances]], sort_keys=True)
    folder = Path(cache) / "speech" / f"{split}-{count}-seed{seed}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if not (folder / "manifest.jsonl").is_file():
        write_corpus(folder, utterances)
    return read_corpus(folder)


def write_corpus(folder: Path, utterances: Sequence[Utterance]) -> None:
    """Speak the utterances into `folder`: audio.npy, int16 samples end to end, and manifest.jsonl, one line for each with its
    place in it and the sha256 of its samples. The folder appears whole or not at all.

    Many are spoken by several processes, as many as torch has threads, at most 4: 6,000 take about 100 s of one core.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        clips, lines, start = [], [], 0
        workers = min(4, torch.get_num_threads()) if len(utterances) > 200 else 1
        with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
            made = pool.map(_speak16, utterances, chunksize=16) if pool else map(_speak16, utterances)
            for clip in told(made, len(utterances), "utterances spoken"):
                place = {"start": start, "samples": len(clip), "sha256": _hash(clip)}
                lines.append(json.dumps(utterances[len(clips)].as_dict() | place))
                clips.append(clip)
                start += len(clip)
        np.save(partial / "audio.npy", np.concatenate(clips))
        (partial / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        if not (folder / "manifest.jsonl").is_file():  # else another run has just finished the same corpus, and may be reading it
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_corpus(folder: Path) -> SpeechCorpus:
    """What `write_corpus` wrote; the samples stay on disk until they are used. ValueError where they are not what was written."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    samples = np.load(folder / "audio.npy", mmap_mode="r")
    clips = [samples[row["start"] : row["start"] + row["samples"]] for row in rows]
    for row, clip in zip(rows, clips, strict=True):
        if _hash(clip) != row["sha256"]:
            raise ValueError(f"{folder}: {row['id']} does not sound as its manifest says: remove the folder, and it is made again")
    return SpeechCorpus(clips, [Utterance.of(row) for row in rows])


def _speak16(utterance):
    return to_int16(speak([utterance])[0].numpy())


def _hash(clip):
    return hashlib.sha256(np.ascontiguousarray(clip)).hexdigest()
