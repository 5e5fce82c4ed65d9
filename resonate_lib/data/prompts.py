"""Prompt sets: TTA-Bench's files as they are, and prompts in the same schema over the embedded world's events."""

import json
import random
import re
import warnings
from pathlib import Path

import numpy as np

from resonate_lib.data import audio_folder, scenes

TTA_BENCH_FILES = {
    "accuracy": "acc_prompt.json", "generalization": "generalization_prompt.json", "robustness": "robustness_prompt.json",
    "fairness": "fairness_prompt.json", "bias": "bias_prompt.json", "toxicity": "toxicity_prompt.json"}
EMBEDDED_PARTS = ("accuracy", "generalization", "robustness")
BENCH_KINDS = ("while", "followed by", "three", "count")
RL_SHARES = (0.0, 0.26, 0.26, 0.22, 0.26)  # of scenes.KINDS; no single events, which most bases already make
RELATION_NAMES = {"single": "None", "while": "parallelism", "followed by": "sequence"}
NEW_PATTERNS = {  # wordings that no training caption has
    "while": ["{0} together with {1}", "{1}, and all the while {0}"],
    "followed by": ["First {0}, afterwards {1}", "{0}; once that is over, {1}"],
    "three": ["First {0}, afterwards {1}, finally {2}", "{0}; next {1}; last {2}"]}


def load_tta_bench(directory, part: str) -> list[dict]:
    """The records of one part of TTA-Bench, unaltered, from the benchmark's own files in `directory`.

    Warns where event_count differs from the length of event_list (five accuracy records do). FileNotFoundError says where to
    get the files; ValueError names a record without id or prompt_text.
    """
    if part not in TTA_BENCH_FILES:
        raise ValueError(f"unknown part {part!r} of TTA-Bench: use one of {', '.join(TTA_BENCH_FILES)}")
    path = Path(directory) / TTA_BENCH_FILES[part]
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: download the prompt files of TTA-Bench (arXiv 2509.02398, MIT licence) into one "
                                "folder and give that folder")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}, line {error.lineno}): download it again") from None
    for number, record in enumerate(records, 1):
        if not record.get("id") or not isinstance(record.get("prompt_text"), str):
            raise ValueError(f"{path}, record {number}: needs `id` and `prompt_text`, has {', '.join(map(str, record))}")
    odd = [r["id"] for r in records if "event_list" in r and len(r["event_list"]) != r.get("event_count")]
    if odd:
        some = ", ".join(odd[:5])
        warnings.warn(f"{path.name}: event_count differs from event_list in {len(odd)} records ({some})", stacklevel=2)
    return records


def read_prompts(path) -> list[dict]:
    """Prompts to train on or to listen to: JSON lines, CSV or TSV with `prompt` (or `caption`), as the published RL list has
    them; recordings are not needed. Records with id, prompt_text and the file's other columns; equal texts once.

    ValueError names the entry without a text.
    """
    records: dict[str, dict] = {}
    for number, row in enumerate(audio_folder.rows(path), 1):
        text = str(row.get("prompt") or row.get("caption") or "").strip()
        if not text:
            raise ValueError(f"{path}, entry {number}: found columns {', '.join(map(str, row))}; it needs `prompt` (or `caption`)")
        identity = f"{_slug(row.get('audio_id') or 'prompt')}_{number:05d}"
        records.setdefault(text, {**row, "id": identity, "prompt_text": text, "part": "list"})
    if not records:
        raise ValueError(f"{path} holds no entries: write one line a prompt")
    return list(records.values())


def caption_prompts(records: list[dict]) -> list[dict]:
    """Prompts from the captions of recordings (`audio_folder.load_manifest`): the first caption of each, equal texts once.

    id: the recording's file name and its place; `audio_path` stays, so that prompt and original can be compared.
    """
    found: dict[str, dict] = {}
    for number, record in enumerate(records):
        identity = f"{_slug(Path(record['audio_path']).stem)}_{number:05d}"
        prompt = {"id": identity, "prompt_text": record["caption"], "part": "captions", "audio_path": record["audio_path"]}
        found.setdefault(record["caption"], prompt)
    return list(found.values())


def _slug(name) -> str:
    """A name that may stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", str(name))[:60]


def prompt_record(spec: scenes.Spec, text: str, identity: str, notes: str | None = None, **extra) -> dict:
    """A prompt in TTA-Bench's schema, with the spec (groups, relation, kind) that the judge needs."""
    return {"id": identity, "prompt_text": text, "event_count": len(spec.groups),
            "event_list": [name if count == 1 else f"{name} x{count}" for name, count in spec.groups],
            "event_relation": RELATION_NAMES[spec.relation], "source": "embedded", "notes": notes,
            "groups": [list(group) for group in spec.groups], "relation": spec.relation, "kind": spec.kind, **extra}


def embedded_bench(part: str = "accuracy", *, split: str = "test", count: int = 100, seed: int = 0,
                   world_seed: int = 0) -> list[dict]:
    """`count` prompts over the embedded world's events, all of combinations held out for `split` (a single event cannot be
    one), kinds in turn, no two with one text.

    accuracy: captions in the training's wordings. generalization: wordings never trained on. robustness: captions perturbed
    (uppercase, misspelling, space, punctuate in turn; `perturbation_type`, with the clean text in `unperturbed`).
    """
    if part not in EMBEDDED_PARTS:
        raise ValueError(f"unknown part {part!r} of the embedded benchmark: use one of {', '.join(EMBEDDED_PARTS)}")
    rng = np.random.default_rng([world_seed, scenes.SPLITS.index(split), seed, 77, EMBEDDED_PARTS.index(part)])
    records, texts = [], set()
    for index in range(count):
        for _ in range(1000):
            spec = scenes.sample_spec(rng, split, BENCH_KINDS[index % len(BENCH_KINDS)], world_seed)
            if len(spec.groups) == 1:
                continue
            text = _new_wording(spec, rng) if part == "generalization" else scenes.caption(spec, rng)
            if text not in texts:
                break
        else:
            raise ValueError(f"only {index} different prompts of {split} combinations were found: ask for fewer than {count}")
        texts.add(text)
        identity, extra = f"{part}_{split}_{index:04d}", {"part": part, "heldout": split != "train"}
        if part == "robustness":
            kind = list(PERTURBATIONS)[(index // len(BENCH_KINDS)) % len(PERTURBATIONS)]
            extra |= {"perturbation_type": kind, "unperturbed": text}
            text = PERTURBATIONS[kind](text, random.Random(f"{seed}-{index}"))
        records.append(prompt_record(spec, text, identity, **extra))
    return records


def rl_prompts(count: int, *, seed: int = 0, world_seed: int = 0) -> list[dict]:
    """`count` prompts to train on by reinforcement: specs and captions of the training split, kinds by RL_SHARES."""
    rng = np.random.default_rng([world_seed, seed, 78])
    out = []
    for index in range(count):
        spec = scenes.sample_spec(rng, "train", None, world_seed, RL_SHARES)
        out.append(prompt_record(spec, scenes.caption(spec, rng), f"rl_{seed}_{index:05d}", part="rl", heldout=False))
    return out


def _new_wording(spec, rng):
    patterns = NEW_PATTERNS["three" if len(spec.groups) == 3 else spec.relation]
    said = [scenes.say(group, "gerund", rng) for group in spec.groups]
    text = patterns[int(rng.integers(len(patterns)))].format(*said)
    return text[0].upper() + text[1:]


def _uppercase(text, rng):
    return "".join(c.upper() if rng.random() < 0.25 else c for c in text)


def _misspelling(text, rng):
    words = text.split()
    index = rng.choice([i for i, word in enumerate(words) if len(word) > 3])
    at = rng.randrange(1, len(words[index]) - 2)
    word = words[index]
    words[index] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def _space(text, rng):
    return "".join(c + " " * (rng.random() < 0.08) for c in text).replace(" ", "  ", 1)


def _punctuate(text, rng):
    return " ".join(word + rng.choice(["", "", ",", "!"]) for word in text.split()) + "..."


PERTURBATIONS = {"uppercase": _uppercase, "misspelling": _misspelling, "space": _space, "punctuate": _punctuate}
