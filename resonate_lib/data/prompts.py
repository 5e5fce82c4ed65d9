"""Prompt sets: TTA-Bench's files as they are, and prompts in the same schema over the embedded world's events."""

import json
import random
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resonate_lib.data import audio_folder, events, scenes

TTA_BENCH_FILES = {
    "accuracy": "acc_prompt.json", "generalization": "generalization_prompt.json", "robustness": "robustness_prompt.json",
    "fairness": "fairness_prompt.json", "bias": "bias_prompt.json", "toxicity": "toxicity_prompt.json"}
PROMPT_NUMBERS = {  # of prompt_0001 to prompt_3000, both ends included
    "accuracy": (1, 1500), "generalization": (1501, 1800), "robustness": (1801, 2100), "fairness": (2101, 2400),
    "bias": (2401, 2700), "toxicity": (2701, 3000)}
NEVER_PUBLISHED = {"prompt_2325"}
RELATIONS = ("None", "parallelism", "sequence", "complex")
PERTURBATION_TYPES = ("uppercase", "synonym", "misspelling", "space", "rewrite", "punctuate")
SPEAKERS = {"gender": ("male", "female"), "age": ("old", "middle", "youth", "child"), "language": ("en", "zh", "other")}
TOXICITY = frozenset({"hate", "violence & self-harm", "sexual", "shocking", "illegal activity"})
SOURCES = ("template", "dataset", "manual")
# What each field of a part may hold: one of some values, a text, a list of texts (or of some values), a text of a pattern.
FIELDS = {
    "accuracy": {"Dimensions of evaluation": ("Accuracy",), "event_count": (1, 2, 3, 4, 5), "event_list": list,
                 "event_relation": RELATIONS, "source": SOURCES, "notes": re.compile("scene:.+")},
    "generalization": {"Dimensions of evaluation": ("Generalization",), "event_count": (1, 2, 3, 4), "event_list": list,
                       "source": SOURCES, "notes": (None,)},
    "robustness": {"Dimensions of evaluation": ("Robustness",), "perturbation_type": PERTURBATION_TYPES, "source": SOURCES,
                   "notes": re.compile(r"\d+(; .+)?")},
    "fairness": {"Dimensions of evaluation": ("Fairness",), "source": SOURCES, "notes": sum(SPEAKERS.values(), ())},
    "bias": {"Dimensions of evaluation": ("Bias",), "source": SOURCES,
             "notes": re.compile(r"From (train|val|test)\.csv, audiocap_id: \d+|Generated from gender-specific prompt: '.+'")},
    "toxicity": {"notes": re.compile("source_prompt:.+", re.DOTALL), "categories": TOXICITY}}
OPTIONAL_FIELDS = {"fairness": {"Fairness_type": ("language",)}}
GROUP_SIZES = {
    "accuracy": (("event_count", "event_relation"), {
        (1, "None"): 280, (2, "parallelism"): 250, (2, "sequence"): 164, (3, "parallelism"): 150, (3, "sequence"): 126,
        (3, "complex"): 67, (4, "parallelism"): 92, (4, "sequence"): 73, (4, "complex"): 76, (5, "parallelism"): 54,
        (5, "sequence"): 54, (5, "complex"): 114}),
    "generalization": (("event_count",), {(1,): 30, (2,): 120, (3,): 120, (4,): 30}),
    "robustness": (("perturbation_type",), {(name,): 50 for name in PERTURBATION_TYPES}),
    "fairness": (("notes",), {("male",): 50, ("female",): 50, ("old",): 25, ("middle",): 25, ("youth",): 25, ("child",): 25,
                              ("en",): 33, ("zh",): 33, ("other",): 33})}
EMBEDDED_PARTS = ("accuracy", "generalization", "robustness")
BENCH_KINDS = ("while", "followed by", "three", "count")
RL_SHARES = (0.0, 0.26, 0.26, 0.22, 0.26)  # of scenes.KINDS; no single events, which most bases already make
RELATION_NAMES = {"single": "None", "while": "parallelism", "followed by": "sequence"}
NEW_PATTERNS = {  # wordings that no training caption has
    "while": ["{0} together with {1}", "{1}, and all the while {0}"],
    "followed by": ["First {0}, afterwards {1}", "{0}; once that is over, {1}"],
    "three": ["First {0}, afterwards {1}, finally {2}", "{0}; next {1}; last {2}"]}

CLAP_PPO_PROMPTS = (  # of the table of original and fine-tuned sound in "CLAP-Reward Guided Diffusion Fine-Tuning"
    "Water flowing, wind blowing, a dog whimpers.", "A man snoring.", "Boys are talking and a dog is barking.",
    "Water running followed by wind.", "A lion roaring followed by a synthesized whoosh then birds chirpings.",
    "A man talking before shouting then whistling followed by rustling")  # fmt: skip
JOINING = {  # words that join, order or count what is heard, and name no sound
    "a", "after", "afterwards", "again", "all", "an", "and", "are", "as", "at", "background", "before", "being", "by", "during",
    "each", "finally", "first", "followed", "following", "for", "from", "in", "is", "it", "its", "last", "later", "next", "of",
    "off", "on", "once", "one", "or", "over", "same", "some", "that", "the", "their", "then", "they", "three", "time", "times",
    "to", "together", "twice", "two", "was", "were", "when", "while", "with",
}  # fmt: skip


class Vocabulary(NamedTuple):
    """What the embedded world has of a prompt: the events named in it, and the words for things that it has not."""

    events: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def note(self) -> str:
        """A sentence for a prompt that names anything else than the world's events; "" for one that does not."""
        if self.events and not self.strange:
            return ""
        known = f"of this prompt it knows {', '.join(self.events)}" if self.events else "it knows nothing of this prompt"
        return f"Outside the model's vocabulary: {', '.join(self.strange) or 'all of it'}; {known}"


def vocabulary(text: str) -> Vocabulary:
    """Which events of the embedded world a prompt names, and which of its words, in their order, the world has not.

    A word is known where any of the world's captions may have it, in the plural too. Known words need not name an event ("a
    person falls"): `events` is empty then.
    """
    known = JOINING | _world_words()
    words = dict.fromkeys(re.findall("[a-z]+", text.lower()))
    strange = [word for word in words if word not in known and word.removesuffix("s") not in known]
    return Vocabulary(tuple(events.mentioned(text)), tuple(strange))


@cache
def _world_words() -> frozenset[str]:
    said = [" ".join((name, *e.clauses, *e.gerunds, *(e.countable or ()))) for name, e in events.EVENTS.items()]
    return frozenset(re.findall("[a-z]+", " ".join(said).lower()))


def clap_ppo_prompts() -> list[dict]:
    """The six prompts of the CLAP-reward paper's table as records: id, prompt_text, part."""
    return [{"id": f"clap_ppo_{i}", "prompt_text": text, "part": "paper"} for i, text in enumerate(CLAP_PPO_PROMPTS, 1)]


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
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error.msg}, line {error.lineno}): download it again") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a {type(records).__name__}, not a list of prompts: download it again")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not record.get("id") or not isinstance(record.get("prompt_text"), str):
            has = ", ".join(map(str, record)) if isinstance(record, dict) else repr(record)
            raise ValueError(f"{path}, record {number}: needs `id` and `prompt_text`, has {has}")
    listed = [r for r in records if isinstance(r.get("event_list"), list)]
    odd = [str(r["id"]) for r in listed if len(r["event_list"]) != r.get("event_count")]
    if odd:
        some = ", ".join(odd[:5])
        warnings.warn(f"{path.name}: event_count differs from event_list in {len(odd)} records ({some})", stacklevel=2)
    return records


def load_all(directory) -> dict[str, list[dict]]:
    """All six parts by name, 2,999 prompts, each checked against the schema; errors and warnings as for one part."""
    parts = {part: load_tta_bench(directory, part) for part in TTA_BENCH_FILES}
    for part, records in parts.items():
        check_schema(records, part)
    return parts


def check_schema(records: list[dict], part: str) -> None:
    """ValueError unless these are the prompts of one part of TTA-Bench: ids, types and values of all fields, sizes of groups.

    Keys beyond the schema pass, and so does an event_count that is not the length of event_list (`load_tta_bench` warns).
    The message names the file, the record and what is allowed.
    """
    file, (first, last) = TTA_BENCH_FILES[part], PROMPT_NUMBERS[part]
    wanted = [name for name in map(_prompt_id, range(first, last + 1)) if name not in NEVER_PUBLISHED]
    allowed, seen = set(wanted), set()
    for number, record in enumerate(records, 1):
        where, identity = f"{file}, record {number} ({record.get('id')})", record.get("id")
        if not isinstance(identity, str) or identity not in allowed:
            raise ValueError(f"{where}: allowed ids of {part} are {wanted[0]} to {wanted[-1]}{_except(first, last)}")
        if identity in seen:
            raise ValueError(f"{where}: this id occurs twice; ids must be unique")
        seen.add(identity)
        optional = {field: rule for field, rule in OPTIONAL_FIELDS.get(part, {}).items() if field in record}
        for field, rule in {"prompt_text": str, **FIELDS[part], **optional}.items():
            if field not in record:
                raise ValueError(f"{where}: no field {field!r}; it must hold {_said(rule)}")
            if not _allows(rule, record[field]):
                raise ValueError(f"{where}: {field} is {record[field]!r:.80}; it must hold {_said(rule)}")
    if absent := [name for name in wanted if name not in seen]:
        raise ValueError(f"{file}: {len(absent)} of {len(wanted)} prompts are missing, such as {absent[0]}: download it again")
    fields, sizes = GROUP_SIZES.get(part, ((), {}))
    found = Counter(tuple(record[field] for field in fields) for record in records) if fields else {}
    for group in sizes:
        if found[group] != sizes[group]:
            named = ", ".join(f"{field} {value}" for field, value in zip(fields, group, strict=True))
            raise ValueError(f"{file}: {found[group]} prompts of {named}; the benchmark has {sizes[group]}: download it again")


def _prompt_id(number: int) -> str:
    return f"prompt_{number:04d}"


def _except(first: int, last: int) -> str:
    gaps = sorted(name for name in NEVER_PUBLISHED if _prompt_id(first) <= name <= _prompt_id(last))
    return f", without {', '.join(gaps)}" if gaps else ""


def _allows(rule, value) -> bool:
    if rule is str:
        return isinstance(value, str) and bool(value.strip())
    if rule is list or isinstance(rule, frozenset):
        return isinstance(value, list) and bool(value) and all(_allows(str if rule is list else tuple(rule), v) for v in value)
    if isinstance(rule, re.Pattern):
        return isinstance(value, str) and rule.fullmatch(value) is not None
    return any(type(value) is type(one) and value == one for one in rule)  # True is no count of 1


def _said(rule) -> str:
    if rule in (str, list):
        return "a text" if rule is str else "a list of texts, one at least"
    if isinstance(rule, re.Pattern):
        return f"a text of the form {rule.pattern}"
    names = ", ".join(sorted(rule) if isinstance(rule, frozenset) else ["null" if one is None else str(one) for one in rule])
    return f"a list of {names}" if isinstance(rule, frozenset) else f"{'one of ' if len(rule) > 1 else ''}{names}"


def part_of(record: dict) -> str:
    """The part a prompt belongs to: what it says itself, else by its number in TTA-Bench, else ""."""
    number = _number(record["id"])
    found = (part for part, (first, last) in PROMPT_NUMBERS.items() if number is not None and first <= number <= last)
    return record.get("part") or next(found, "")


def original_id(identity: str, notes) -> str | None:
    """The accuracy prompt that a robustness prompt of TTA-Bench perturbs: its notes begin with that prompt's number.

    Each of 50 accuracy prompts is perturbed in six ways, so the benchmark's own files do hold the unperturbed text. None for
    other prompts.
    """
    known = part_of({"id": identity}) == "robustness" and re.match(r"\d+", str(notes))
    return _prompt_id(int(known.group())) if known else None


def unperturbed(records: list[dict], accuracy: list[dict] = ()) -> list[dict]:
    """Robustness prompts with their clean text, as part "clean": the same ids, so the same noise and pairs with the perturbed.

    The text is the record's own `unperturbed`, else that of the accuracy prompt it was made from (`original_id`), where
    `accuracy` holds it; prompts with neither are left out.
    """
    texts = {record["id"]: record["prompt_text"] for record in accuracy}
    clean = [record.get("unperturbed") or texts.get(original_id(record["id"], record.get("notes"))) for record in records]
    return [{**r, "prompt_text": text, "part": "clean"} for r, text in zip(records, clean, strict=True) if text]


def clip_name(system_number: int, record: dict) -> str:
    """The file name that TTA-Bench's own tools expect of a clip, such as S001_P0001.wav; 0 is the raters' probe.

    ValueError for a number outside 0 to 999 and for a prompt that is not the benchmark's.
    """
    number = _number(record["id"])
    if number is None or not 0 <= system_number <= 999:
        raise ValueError(f"system {system_number}, prompt {record['id']!r}: a clip's name needs a system from 0 to 999 and one of "
                         f"{_prompt_id(1)} to {_prompt_id(3000)}")
    return f"S{system_number:03d}_P{number:04d}.wav"


def parse_clip_name(name: str) -> tuple[int, str]:
    """S001_P0001.wav, with or without folders and ending, as (1, "prompt_0001"); ValueError for any other name."""
    found = re.fullmatch(r"S(\d{3})_P(\d{4})(\.\w+)?", re.split(r"[/\\]", str(name))[-1])
    if not found:
        raise ValueError(f"{name!r} is no clip of TTA-Bench: names are like S001_P0001.wav, system and prompt")
    return int(found[1]), _prompt_id(int(found[2]))


def _number(identity) -> int | None:
    """The number of a prompt of TTA-Bench; None for any other id."""
    found = re.fullmatch(r"prompt_(\d{4})", str(identity))
    return int(found[1]) if found and 1 <= int(found[1]) <= 3000 else None


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
