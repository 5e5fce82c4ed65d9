"""Scenes of the embedded world: what is asked (a spec), how it is said (captions), how it sounds (audio with exact times).

A spec is `groups` ([[name, count], ...] in order) and a `relation` ("single", "while", "followed by"). Splits differ by
scene and by combination: some unordered pairs and some ordered pairs of events never occur together in training.
Corpora are folders of FLAC files with a manifest of JSON lines, which `audio_folder.py` reads like anybody's recordings.
"""

import hashlib
import itertools
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import soundfile

from resonate_lib.data import events as ev
from resonate_lib.progress import told

SAMPLE_RATE = ev.SAMPLE_RATE
SECONDS = 4.0
SIZE = int(SAMPLE_RATE * SECONDS)
SPLITS = ("train", "validation", "test")
# What a corpus sounds like is decided in these two files, so their content is part of its name in the cache.
WORLD = hashlib.sha256(b"".join(Path(module).read_bytes() for module in (ev.__file__, __file__))).hexdigest()[:8]
KINDS = ("single", "while", "followed by", "three", "count")
KIND_SHARES = (0.24, 0.20, 0.26, 0.12, 0.18)
CLAP_SHARES = (0.17, 0.17, 0.22, 0.12, 0.32)  # more repetitions than there are, for a reward that hears few of them
LALM_SLIPS = 0.3  # tried on so many of an LALM's scenes, possible in under half of them: 13 % have one event too often;
# without, P(yes) of clips with one event too often is 0.63, with 0.43 (all right: 0.9)
NUMBER_WORDS = {1: "one", 2: "two", 3: "three"}
TIMES_WORDS = {2: "twice", 3: "three times"}
CLASSES = tuple(ev.EVENTS)
COUNTABLE = tuple(name for name, event in ev.EVENTS.items() if event.countable)


@dataclass(frozen=True)
class Spec:
    """What is asked: groups ((name, count), ...) in order, and their relation."""

    groups: tuple[tuple[str, int], ...]
    relation: str

    @property
    def kind(self) -> str:
        """"count" where an event sounds more than once, "three", else the relation."""
        if any(count > 1 for _, count in self.groups):
            return "count"
        if len(self.groups) == 3:
            return "three"
        return self.relation

    @property
    def names(self) -> tuple[str, ...]:
        """The events asked for, in order, without their counts."""
        return tuple(name for name, _ in self.groups)

    @classmethod
    def of(cls, record: dict) -> "Spec":
        """The Spec of a record with "groups" and "relation"."""
        return cls(tuple((name, int(count)) for name, count in record["groups"]), record["relation"])


# --- held-out combinations -------------------------------------------------------------------------------------------


@cache
def held_out(world_seed: int = 0) -> dict[str, frozenset]:
    """Combinations kept from training: {"pairs:test", "pairs:validation": unordered (frozenset of two names),
    "orders:test", "orders:validation": ordered (first, second)}; 12 % and 6 % of the pairs, 10 % and 5 % of the others' orders."""
    rng = np.random.default_rng([world_seed, 20])
    pairs = [frozenset(pair) for pair in itertools.combinations(sorted(CLASSES), 2)]
    order = rng.permutation(len(pairs))
    cuts = np.cumsum([round(share * len(pairs)) for share in (0.12, 0.06, 0.10, 0.05)])
    parts = np.split(order, cuts)
    directed = lambda indices: frozenset(  # noqa: E731
        tuple(sorted(pairs[i], reverse=bool(rng.integers(2)))) for i in indices)
    return {"pairs:test": frozenset(pairs[i] for i in parts[0]), "pairs:validation": frozenset(pairs[i] for i in parts[1]),
            "orders:test": directed(parts[2]), "orders:validation": directed(parts[3])}


def combination_split(spec: Spec, world_seed: int = 0) -> str:
    """The split whose held-out combination the spec contains ("train" when it holds none; test goes before validation)."""
    kept = held_out(world_seed)
    found = "train"
    for first, second in itertools.combinations(spec.names, 2):
        for split in ("validation", "test"):
            pair = frozenset((first, second)) in kept[f"pairs:{split}"]
            ordered = spec.relation == "followed by" and (first, second) in kept[f"orders:{split}"]
            if (pair or ordered) and found != "test":
                found = split
    return found


def sample_spec(rng: np.random.Generator, split: str = "train", kind: str | None = None, world_seed: int = 0,
                shares: tuple[float, ...] = KIND_SHARES) -> Spec:
    """A random spec that may occur in the split: several events in validation and test always hold a held-out combination.

    split="all" draws from every combination: for a judge, which must know all of them. shares: of the KINDS.
    """
    kind = kind or KINDS[rng.choice(len(KINDS), p=shares)]
    if kind not in KINDS:
        raise ValueError(f"unknown kind of scene {kind!r}: use one of {', '.join(KINDS)}")
    while True:
        spec = _propose(rng, kind)
        if len(spec.groups) == 1 or split == "all" or combination_split(spec, world_seed) == split:
            return spec


def _propose(rng, kind):
    def pick(size):
        return [str(name) for name in rng.choice(CLASSES, size, replace=False)]

    if kind == "single":
        return Spec(((pick(1)[0], 1),), "single")
    if kind in ("while", "followed by"):
        return Spec(tuple((name, 1) for name in pick(2)), kind)
    if kind == "three":
        return Spec(tuple((name, 1) for name in pick(3)), "followed by")
    counted = (str(rng.choice(COUNTABLE)), int(rng.integers(2, 4)))
    if rng.random() < 0.5:
        return Spec((counted,), "single")
    other = str(rng.choice([name for name in CLASSES if name != counted[0]]))
    groups = (counted, (other, 1)) if rng.random() < 0.6 else ((other, 1), counted)
    return Spec(groups, "followed by")


# --- captions ---------------------------------------------------------------------------------------------------------


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """One paraphrase of the spec in the style of audio captioning sets."""
    return _sentence(_phrase(spec, rng))


def _phrase(spec, rng):
    groups = spec.groups
    form_of = lambda group, form: say(group, form, rng)  # noqa: E731
    if len(groups) == 1:
        return form_of(groups[0], "clause" if rng.random() < 0.6 else "gerund")
    if spec.relation == "while":
        first, second = groups if rng.random() < 0.5 else groups[::-1]
        pattern, a, b = _choose(rng, [("{} while {}", "clause", "clause"), ("{} as {}", "clause", "clause"),
                                      ("{} and {} at the same time", "gerund", "gerund"),
                                      ("{} with {} in the background", "gerund", "gerund")])
        return pattern.format(form_of(first, a), form_of(second, b))
    if len(groups) == 2:
        pattern, a, b = _choose(rng, [("{} followed by {}", "clause", "gerund"), ("{}, followed by {}", "gerund", "gerund"),
                                      ("{}, then {}", "clause", "clause"), ("{} and then {}", "clause", "clause")])
        return pattern.format(form_of(groups[0], a), form_of(groups[1], b))
    pattern, a, b, c = _choose(rng, [("{}, then {}, then {}", "clause", "clause", "clause"),
                                     ("{} followed by {} and then {}", "clause", "gerund", "gerund"),
                                     ("{}, followed by {}, followed by {}", "gerund", "gerund", "gerund")])
    return pattern.format(form_of(groups[0], a), form_of(groups[1], b), form_of(groups[2], c))


def say(group, form: str, rng) -> str:
    """One counted event in words: form "clause" (a dog barks) or "gerund" (a dog barking)."""
    name, count = group
    event = ev.check_event(name)
    if count > 1:
        if form == "clause" and rng.random() < 0.5:
            return f"{event.clauses[0]} {TIMES_WORDS[count]}"
        return f"{NUMBER_WORDS[count]} {event.countable[1]}"
    return _choose(rng, event.clauses if form == "clause" else event.gerunds)


def _choose(rng, options):
    return options[int(rng.integers(len(options)))]


def _sentence(text):
    return text[0].upper() + text[1:]


def negatives(spec: Spec, rng: np.random.Generator, split: str | None = None, world_seed: int = 0) -> dict[str, str]:
    """Captions that the scene of this spec does NOT fulfil, by what is wrong with them.

    missing: asks one event more than there is. replaced: one event is another. swapped: two neighbours in the wrong order
    (sequences only). count: another number of an event that can be counted ("a dog barks" asks one). Every caption is as
    well-formed as a true one.
    split: none with a combination of events that is held out for another split (a kind may be left out). Whoever learns from
    true captions of training combinations and false ones of all would learn that held-out combinations are never true.
    """
    return {kind: caption(wrong, rng) for kind, wrong in negative_specs(spec, rng, split, world_seed).items()}


def negative_specs(spec: Spec, rng: np.random.Generator, split: str | None = None, world_seed: int = 0) -> dict[str, Spec]:
    """What `negatives` says in words, as Specs by kind."""
    wrong = {}
    for kind, change in (("replaced", _replace), ("missing", _add), ("swapped", _swap), ("count", _recount)):
        for _ in range(20):
            candidate = change(spec, rng)
            if candidate is None or split is None or combination_split(candidate, world_seed) in (split, "train"):
                break
        else:
            candidate = None
        if candidate is not None:
            wrong[kind] = candidate
    return wrong


def _replace(spec, rng):
    groups, index = list(spec.groups), int(rng.integers(len(spec.groups)))
    count = groups[index][1]
    pool = [name for name in CLASSES if name not in spec.names and (count == 1 or name in COUNTABLE)]
    groups[index] = (_choose(rng, pool), count)
    return Spec(tuple(groups), spec.relation)


def _add(spec, rng):
    groups = list(spec.groups)
    if len(groups) == 3 or (len(groups) == 2 and spec.relation == "while"):
        return None
    absent = [name for name in CLASSES if name not in spec.names]
    groups.insert(int(rng.integers(len(groups) + 1)), (_choose(rng, absent), 1))
    both = len(groups) == 2 and spec.groups[0][1] == 1 and rng.random() < 0.5
    return Spec(tuple(groups), "while" if both else "followed by")


def _swap(spec, rng):
    if spec.relation != "followed by":
        return None
    groups, at = list(spec.groups), int(rng.integers(len(spec.groups) - 1))
    groups[at], groups[at + 1] = groups[at + 1], groups[at]
    return Spec(tuple(groups), spec.relation)


def _recount(spec, rng):
    """Another count, from one to three; of uncounted events only now and then, or a number in a caption would mean "no"."""
    groups = list(spec.groups)
    counted = [i for i, (_, count) in enumerate(groups) if count > 1]
    if not counted and len(groups) < 3 and spec.relation != "while" and rng.random() < 0.35:
        counted = [i for i, (name, _) in enumerate(groups) if name in COUNTABLE]
    if not counted:
        return None
    index = _choose(rng, counted)
    name, count = groups[index]
    groups[index] = (name, _choose(rng, [number for number in NUMBER_WORDS if number != count]))
    return Spec(tuple(groups), spec.relation)


# --- sound ------------------------------------------------------------------------------------------------------------


def render(spec: Spec, rng: np.random.Generator, split: str = "train") -> tuple[np.ndarray, list[dict]]:
    """The scene as (64000,) float32 with peak at most 0.95, and its occurrences [{name, onset, offset, level_db}] in seconds, dB.

    Levels are relative to the events' common active RMS of -20 dBFS. Every occurrence of a count has its own gain and pitch.
    """
    audio = rng.standard_normal(SIZE) * 10 ** (rng.uniform(-75, -62) / 20)
    placed = []
    for name, onset, wave, level in _layout(spec, rng, split):
        start = int(onset * SAMPLE_RATE)
        wave = wave[: SIZE - start]
        audio[start : start + len(wave)] += wave * 10 ** (level / 20)
        placed.append({"name": name, "onset": round(start / SAMPLE_RATE, 4),
                       "offset": round((start + len(wave)) / SAMPLE_RATE, 4), "level_db": round(float(level), 2)})
    peak = float(np.abs(audio).max())
    if peak > 0.95:
        audio *= 0.95 / peak
        for event in placed:
            event["level_db"] = round(event["level_db"] + 20 * float(np.log10(0.95 / peak)), 2)
    return audio.astype(np.float32), placed


def _layout(spec, rng, split):
    """(name, onset, waveform, level in dB) of every occurrence."""
    if spec.relation == "while":
        return _together(spec, rng, split)
    occurrences = [name for name, count in spec.groups for _ in range(count)]
    counts = dict(spec.groups)
    plain = sum(count == 1 for count in counts.values())  # beside counted events these share what room is left
    room = (SECONDS - 0.15) / len(occurrences)
    longest = {1: 3.4, 2: 1.75, 3: 1.15}.get(len(occurrences), room)
    waves = []
    for name in occurrences:
        limit = 0.5 if counts[name] > 1 else longest
        if len(occurrences) > len(spec.groups) and counts[name] == 1:
            limit = min(1.4, (SECONDS - 0.66 * (len(occurrences) - plain) - 0.3 * plain) / plain)
        waves.append(ev.render_event(name, rng, split, seconds=min(limit, rng.uniform(*_span(name, limit)))))
    gaps = rng.uniform(0.12, 0.3, len(waves) - 1)
    spare = SECONDS - sum(len(w) for w in waves) / SAMPLE_RATE - gaps.sum()
    onset = rng.uniform(0.0, max(0.02, min(spare, 1.2) if len(waves) > 1 else spare))
    placed, base = [], rng.uniform(-6, 0)
    for index, (name, wave) in enumerate(zip(occurrences, waves, strict=True)):
        placed.append((name, onset, wave, base + rng.uniform(-3, 3)))
        onset += len(wave) / SAMPLE_RATE + (gaps[index] if index < len(gaps) else 0)
    return placed


def _span(name, limit):
    low, high = ev.EVENTS[name].seconds
    return min(low, limit), min(high, limit)


def _together(spec, rng, split):
    """Two events that overlap: the shorter lies for the most part within the longer."""
    parts = sorted(((name, *_in_a_row(name, count, rng, split)) for name, count in spec.groups), key=lambda part: -len(part[1]))
    lengths = [len(wave) / SAMPLE_RATE for _, wave, _ in parts]
    start = rng.uniform(0, SECONDS - lengths[0])
    slack = lengths[0] - 0.8 * lengths[1]
    second = np.clip(start + rng.uniform(0, max(slack, 0.01)), 0, SECONDS - lengths[1])
    base = rng.uniform(-6, 0)
    return [(name, float(onset) + first / SAMPLE_RATE, wave[first:last], base + rng.uniform(-2, 2))
            for (name, wave, spans), onset in zip(parts, (start, second), strict=True) for first, last in spans]


def _in_a_row(name, count, rng, split):
    """One waveform of `count` occurrences, short ones when there are several, and each one's [first, last) in samples."""
    if count == 1:
        wave = ev.render_event(name, rng, split)
        return wave, [(0, len(wave))]
    pieces, spans, at = [], [], 0
    for _ in range(count):
        wave = ev.render_event(name, rng, split, seconds=min(0.5, rng.uniform(*_span(name, 0.5))))
        gap = np.zeros(int(rng.uniform(0.12, 0.3) * SAMPLE_RATE), dtype=wave.dtype)
        spans.append((at, at + len(wave)))
        pieces += [wave, gap]
        at += len(wave) + len(gap)
    return np.concatenate(pieces[:-1]), spans


# --- corpora ----------------------------------------------------------------------------------------------------------


def slip(spec: Spec, rng: np.random.Generator) -> Spec:
    """The spec with one event twice, as a generator may slip; itself where none can be counted or one already is."""
    able = [i for i, (name, _) in enumerate(spec.groups) if name in COUNTABLE]
    if not able or any(count > 1 for _, count in spec.groups):
        return spec
    index = _choose(rng, able)
    return Spec(tuple((name, 2 if i == index else 1) for i, (name, _) in enumerate(spec.groups)), spec.relation)


def make_scene(index: int, *, split: str, seed: int, world_seed: int = 0, combinations: str | None = None,
               shares: tuple[float, ...] = KIND_SHARES, slips: float = 0.0) -> tuple[np.ndarray, dict]:
    """Scene number `index` of a corpus: audio (64000,) and its record without file fields. Same arguments, same scene.

    combinations: which combinations of events occur: the split's own (default) or "all". slips: share of the scenes on which
    a `slip` is tried; the record and its captions tell what is heard.
    """
    rng = np.random.default_rng([world_seed, SPLITS.index(split), seed, index])
    spec = sample_spec(rng, combinations or split, None, world_seed, shares)
    if slips and rng.random() < slips:
        spec = slip(spec, rng)
    audio, placed = render(spec, rng, split)
    captions = [caption(spec, rng) for _ in range(3)]
    record = {"id": f"{split}_{seed}_{index:06d}", "caption": captions[0], "captions": captions,
              "groups": [list(group) for group in spec.groups], "relation": spec.relation, "kind": spec.kind,
              "split": split, "events": placed}
    return audio, record


def _write_scene(index, directory, **options):
    audio, record = make_scene(index, **options)
    path = Path(directory) / "audio" / f"{record['id']}.flac"
    soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
    record |= {"audio_path": f"audio/{path.name}", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return json.dumps(record)


def make_corpus(directory, *, split: str, count: int, seed: int = 0, world_seed: int = 0, workers: int | None = None) -> Path:
    """Write `count` scenes of a split (FLAC, 16 kHz, mono) and manifest.jsonl; returns the manifest's path.

    A finished folder is reused as it is; an unfinished one is rebuilt. About 1.5 ms of one core and 60 kB a scene.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if count < 1:
        raise ValueError(f"count={count}: a corpus needs at least one scene")
    directory = Path(directory)
    manifest = directory / "manifest.jsonl"
    if manifest.is_file():
        return manifest
    partial_folder = directory.with_name(f"{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial_folder, ignore_errors=True)
    (partial_folder / "audio").mkdir(parents=True)
    try:
        write = partial(_write_scene, directory=str(partial_folder), split=split, seed=seed, world_seed=world_seed)
        with ProcessPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
            lines = list(told(pool.map(write, range(count), chunksize=64), count, f"scenes of {split}"))
        (partial_folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
        if not manifest.is_file():  # else another run has just finished the same corpus, and may be reading it
            shutil.rmtree(directory, ignore_errors=True)
            partial_folder.replace(directory)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)
    return manifest
