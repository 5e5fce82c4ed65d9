"""A corpus held in memory for training: audio as int16, records, and batches with captions, hard negatives and frame labels."""

import contextlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from resonate_lib.data import audio_folder, scenes
from resonate_lib.progress import told

SHORTEST = 2.0  # seconds of a recording, as published
LABEL_RATE = 25  # frames per second of the activity labels


class Corpus:
    """Audio (n, T) int16 at `sample_rate` and one record a clip. Indexable by lists of positions."""

    def __init__(self, audio: np.ndarray, records: list[dict], sample_rate: int, world_seed: int = 0):
        self.audio, self.records, self.sample_rate, self.world_seed = audio, records, sample_rate, world_seed

    def __len__(self):
        return len(self.records)

    @classmethod
    def from_manifest(cls, path, *, sample_rate=scenes.SAMPLE_RATE, seconds=scenes.SECONDS, world_seed: int = 0) -> "Corpus":
        """What a caption file lists, read once; recordings are cut or zero-padded to `seconds`."""
        records = audio_folder.load_manifest(path)
        audio = np.empty((len(records), round(sample_rate * seconds)), dtype=np.int16)
        for start in range(0, len(records), 256):
            batch = audio_folder.load_audio(records[start : start + 256], sample_rate=sample_rate, seconds=seconds)
            audio[start : start + 256] = to_int16(batch.numpy())
        return cls(audio, records, sample_rate, world_seed)

    @classmethod
    def from_scenes(cls, count: int, *, split="train", seed=0, world_seed=0, combinations=None,
                    shares=scenes.KIND_SHARES, slips=0.0, workers=None) -> "Corpus":
        """`count` scenes rendered straight into memory (the same scenes `make_corpus` would write), by `workers` processes:
        default torch's number of threads, at most 4."""
        audio, records = np.empty((count, scenes.SIZE), dtype=np.int16), []
        make = partial(_scene16, split=split, seed=seed, world_seed=world_seed, combinations=combinations, shares=shares,
                       slips=slips)
        workers = workers or min(4, torch.get_num_threads())
        with ProcessPoolExecutor(workers) if workers > 1 else contextlib.nullcontext() as pool:
            made = pool.map(make, range(count), chunksize=32) if pool else map(make, range(count))
            for wave, record in told(made, count, f"scenes of {split}"):
                audio[len(records)] = wave
                records.append(record)
        return cls(audio, records, scenes.SAMPLE_RATE, world_seed)

    def first(self, count: int) -> "Corpus":
        """Its first `count` clips (all where it has no more)."""
        return Corpus(self.audio[:count], self.records[:count], self.sample_rate, self.world_seed)

    def waveforms(self, positions) -> torch.Tensor:
        """(B, T) float32 in [-1, 1]."""
        return torch.from_numpy(self.audio[np.asarray(positions)].astype(np.float32) / 32767.0)

    def captions(self, positions, rng: np.random.Generator) -> list[str]:
        """One of each clip's own captions, at random."""
        choices = (self.records[position]["captions"] for position in positions)
        return [options[int(rng.integers(len(options)))] for options in choices]

    def paraphrases(self, positions, rng: np.random.Generator) -> list[str]:
        """As `captions`, but written anew where the clip is a scene: more wordings than its record holds."""
        if "groups" not in self.records[0]:
            return self.captions(positions, rng)
        return [scenes.caption(scenes.Spec.of(self.records[position]), rng) for position in positions]

    def activity(self, positions) -> torch.Tensor:
        """(B, frames, classes) float32 at 25 Hz: 1 where an event sounds."""
        frames = round(self.audio.shape[1] / self.sample_rate * LABEL_RATE)
        labels = torch.zeros(len(positions), frames, len(scenes.CLASSES))
        for row, position in enumerate(positions):
            for event in self.records[position]["events"]:
                first, last = int(event["onset"] * LABEL_RATE), int(np.ceil(event["offset"] * LABEL_RATE))
                labels[row, first : max(last, first + 1), scenes.CLASSES.index(event["name"])] = 1.0
        return labels

    def onsets(self, positions) -> torch.Tensor:
        """(B, frames, classes) float32 at 25 Hz: 1 in the first two frames of every occurrence."""
        frames = round(self.audio.shape[1] / self.sample_rate * LABEL_RATE)
        labels = torch.zeros(len(positions), frames, len(scenes.CLASSES))
        for row, position in enumerate(positions):
            for event in self.records[position]["events"]:
                first = int(event["onset"] * LABEL_RATE)
                labels[row, first : first + 2, scenes.CLASSES.index(event["name"])] = 1.0
        return labels

    def batch(self, generator: torch.Generator, size: int) -> dict:
        """A random batch: audio (B, T), captions, negatives of the split (list of {kind: caption}), activity (B, frames,
        classes), positions."""
        positions = torch.randint(len(self), (size,), generator=generator).tolist()
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        batch = {"positions": positions, "audio": self.waveforms(positions), "captions": self.paraphrases(positions, rng)}
        if "groups" in self.records[0]:
            specs = ((scenes.Spec.of(self.records[p]), self.records[p]["split"]) for p in positions)
            batch["negatives"] = [scenes.negatives(spec, rng, split, self.world_seed) for spec, split in specs]
            batch["activity"] = self.activity(positions)
        return batch


class LazyCorpus:
    """Recordings and captions read from disk when asked for: a corpus too large for memory, with the same methods.

    seconds: clips are cut or zero-padded to it. Recordings whose record states a `duration` under 2 s are left out, as in the
    published loader; one that cannot be read is an error that names it (the published loader trains on silence instead).
    A recording is one clip, and `captions` draws one of its own at random. Differs from the published loader, to which each
    caption is a clip: there a recording with more captions than others is heard more often.
    """

    def __init__(self, records: list[dict], *, sample_rate: int, seconds: float):
        self.records = [record for record in records if float(record.get("duration") or SHORTEST) >= SHORTEST]
        self.sample_rate, self.seconds = sample_rate, seconds
        self._ahead = (None, None)  # positions that are being read, and the future of their batch
        if not self.records:
            raise ValueError(f"all {len(records)} recordings are shorter than {SHORTEST:g} s: nothing is left")

    def __len__(self):
        return len(self.records)

    def waveforms(self, positions) -> torch.Tensor:
        """(B, T) float32 in [-1, 1]."""
        return self.with_lengths(positions)[0]

    def with_lengths(self, positions) -> tuple[torch.Tensor, torch.Tensor]:
        """Waveforms (B, T) and how many samples (B,) of each are the recording's, not padding."""
        ahead, batch = self._ahead
        if ahead != list(positions):
            return self._read(positions)
        self._ahead = (None, None)
        return batch.result()

    def prefetch(self, positions) -> None:
        """Begin to read these clips in the background; `with_lengths` of the same positions then waits for them, and raises what
        went wrong. One batch at a time: a later one takes its place."""
        pool = ThreadPoolExecutor(1)
        self._ahead = (list(positions), pool.submit(self._read, list(positions)))
        pool.shutdown(wait=False)

    def _read(self, positions):
        chosen = [self.records[position] for position in positions]
        return audio_folder.load_with_lengths(chosen, sample_rate=self.sample_rate, seconds=self.seconds)

    def first(self, count: int) -> "LazyCorpus":
        """Its first `count` clips (all where it has no more)."""
        return LazyCorpus(self.records[:count], sample_rate=self.sample_rate, seconds=self.seconds)

    captions = Corpus.captions


def corpus_manifest(config, split: str, *, seed: int, cache) -> Path:
    """The caption file of the embedded world's scenes of a `DataConfig`, written once into `cache`/corpora. split: train,
    validation or test."""
    count = getattr(config, f"{split}_clips")
    folder = Path(cache) / "corpora" / f"{split}-{count}-seed{seed}-world{config.world_seed}-{scenes.WORLD}"
    return scenes.make_corpus(folder, split=split, count=count, seed=seed, world_seed=config.world_seed)


def open_corpus(config, split: str, *, seed: int, cache) -> Corpus:
    """The scenes of a `DataConfig` without a folder, read into memory from their `corpus_manifest`."""
    return Corpus.from_manifest(corpus_manifest(config, split, seed=seed, cache=cache), world_seed=config.world_seed)


def to_int16(audio):
    """Samples in [-1, 1], clipped there, as 16-bit integers of the same shape."""
    return np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)


def _scene16(index, **options):
    audio, record = scenes.make_scene(index, **options)
    return to_int16(audio), record
