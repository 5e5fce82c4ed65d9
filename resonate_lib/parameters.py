"""The parameters of a request, checked before any kernel starts: which notebooks there are, which names they declare, and
each value in the type that its notebook needs.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import nbformat
import yaml

from resonate_lib import config, knobs, reward_spec

SOURCES = ("clap_source", "lalm_source", "clap_eval_source", "lalm_eval_source", "roberta_source", "aesthetics_source",
           "msclap_source", "gpt2_source")  # fmt: skip
# {section: (dataclass, names)} of what every notebook reads from the profile for itself: a value given for it holds for all.
SHARED: dict[str, tuple[type[knobs.Config], tuple[str, ...]]] = {
    "data": (config.DataConfig, tuple(knobs.field_types(config.DataConfig))),
    "suite": (config.SuiteConfig, ("weights", "vae", "vocoder", "text", "seconds")),
    "reward": (config.RewardConfig, (*SOURCES, "clap_published_rate", "lalm_quantisation", "lalm_offload", "lalm_fallback")),
    "eval": (config.EvalConfig, ("tta_bench",)),
    "diffusion": (config.DiffusionConfig, ("source",)),
}
DEFAULT_LAST = "07"  # 08 and later run with --all or --only
RESERVED = {"profile": "--profile", "seed": "--seed", "run": "RESONATE_RESULTS"}
FIRST_RECORDINGS = 64  # opened before a run starts
KINDS = {"int": int, "float": float, "str": str, "bool": bool}


def discover(folder: Path, only: tuple[str, ...] | None, all_notebooks: bool) -> dict[str, Path]:
    """{number: path} of the notebooks to run, in order. `only` takes numbers (04 or 4) and full names. Raises
    ValueError."""
    every = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not every:
        raise ValueError(f"no notebooks named NN_*.ipynb in {folder}: check out the repository in full")
    if only is None:
        return {number: path for number, path in every.items() if all_notebooks or number <= DEFAULT_LAST}
    names, chosen = {path.stem: number for number, path in every.items()}, set()
    for item in only:
        number = names.get(item.removesuffix(".ipynb"), item.zfill(2))
        if number not in every:
            raise ValueError(knobs.unknown("notebook", item, [*every, *names] if not item.isdigit() else list(every)))
        chosen.add(number)
    return {number: path for number, path in every.items() if number in chosen}


def inspect(path: Path) -> dict[str, str]:
    """{name: annotation} of the notebook's parameters cell. Raises ValueError for a notebook that cannot be read."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    try:
        nbformat.validate(nbformat.read(path, as_version=4))
        found = papermill.inspect_notebook(str(path))
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror or error}; make the file readable") from None
    except Exception as error:  # nbformat, papermill and jsonschema each raise their own for a damaged file
        first = " ".join(str(error).split())[:120]
        raise ValueError(f"{path.name}: not a valid notebook ({first}); restore it with git") from None
    return {name: item["inferred_type_name"] for name, item in found.items()}


def check(
    overrides: dict[str, Any], declared: dict[str, dict[str, str]], profile: str, params_dir: Path
) -> dict[str, dict[str, Any]]:
    """{notebook number: {name: value of the right type}}: each override for the notebooks it is meant for.

    A name is a field of one of the notebook's dataclasses, or `<section>_<field>` (`nft_steps`), and is checked by it
    with the others given; else the annotation in the parameters cell decides. A SHARED value also stands under its
    section. Raises ValueError: unknown name, bad value.
    """
    given = _spread(overrides, declared)
    checked = {}
    for number, names in declared.items():
        mine = {name: _absolute(name, value) for name, value in given[number].items()}
        places = {name: _place(number, name) for name in mine}
        for name in [name for name, value in mine.items() if name.split("_")[-1] == "reward" and isinstance(value, str) and value]:
            rules = places[name] and places[name][0] is config.RecognitionConfig
            mine[name] = _rules(mine[name]) if rules else _reward(name, mine[name])
        for cls in {place[0] for place in places.values() if place}:
            group = {place[1]: mine[name] for name, place in places.items() if place and place[0] is cls}
            values = config.plain(config.resolve(cls, profile, params_dir=params_dir, **group))
            mine.update({name: values[place[1]] for name, place in places.items() if place and place[0] is cls})
        for name in [name for name, place in places.items() if not place]:
            mine[name] = _by_annotation(name, mine[name], names[name])
        checked[number] = mine
    for section, (cls, _) in SHARED.items():
        mine = {name: _absolute(name, value) for name, value in given[section].items()}
        if not mine:
            continue
        values = config.plain(config.resolve(cls, profile, params_dir=params_dir, **mine))
        if section == "data" and values["folder"]:
            whole = config.resolve(config.SuiteConfig, profile, params_dir=params_dir).world == "folder"
            values["captions"] = mine["captions"] = str(_recordings(values["folder"], values["captions"], whole=whole))
            checked |= {n: own | {"captions": values["captions"]} for n, own in checked.items() if "captions" in declared[n]}
        checked[section] = {name: values[name] for name in mine}
    return checked


def _recordings(folder: str, captions: str, *, whole: bool) -> Path:
    """The caption file, read once and its first recordings with it, so that a run of hours does not fall over it later.

    It may lie in `folder`, which the recordings' paths start from, or anywhere else. whole: every split needs a recording (where
    the models learn from the folder; else it is only shown). Raises ValueError.
    """
    from resonate_lib import audio
    from resonate_lib.data import audio_folder

    if not captions:
        raise ValueError(f"folder={folder!r} needs its caption file too: add -p captions FILE (.jsonl, .csv or .tsv)")
    places = [Path(folder) / Path(captions).expanduser(), Path(captions).expanduser().resolve()]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"captions={captions!r}: no such file, neither in {folder} nor in {Path.cwd()}; check the path")
    try:
        records = audio_folder.load_manifest(path, audio_directory=folder)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    missing = set(audio_folder.SPLIT_NAMES) - {audio_folder.split_of(record) for record in records}
    if whole and missing:
        raise ValueError(f"{path}: no recordings of {' and of '.join(sorted(missing))}; this profile needs train, validation and "
                         "test: name them in a column `split`, or add recordings")
    for record in records[:FIRST_RECORDINGS]:
        audio.read(record["audio_path"])
    return path


def _spread(overrides: dict[str, Any], declared: dict[str, dict[str, str]]) -> dict[str, dict[str, Any]]:
    """{notebook number or shared section: {name: value as given}}; a dotted name goes before a bare one. Raises ValueError."""
    places = {**declared, **{section: dict.fromkeys(names) for section, (_, names) in SHARED.items()}}
    known = sorted({name for names in places.values() for name in names} - set(RESERVED))
    given: dict[str, dict[str, Any]] = {place: {} for place in places}
    for key in sorted(overrides, key=lambda key: "." in key):  # dotted names last: they overwrite
        place, _, name = key.rpartition(".")
        if name in RESERVED:
            raise ValueError(f"parameter {key!r} has an option of its own: use {RESERVED[name]}")
        if place and place not in places:
            raise ValueError(f"{knobs.unknown('notebook', place, list(declared))} (in -p {key}, of the notebooks selected)")
        if place and name not in places[place]:
            own = sorted(set(places[place]) - set(RESERVED))
            whose = f"the {place}" if place in SHARED else f"notebook {place}"
            raise ValueError(knobs.unknown(f"parameter of {whose}", name, own))
        if name not in known:
            raise ValueError(knobs.unknown("parameter", name, known) + " (in the notebooks selected)")
        for target in [place] if place else [target for target, names in places.items() if name in names]:
            given[target][name] = overrides[key]
    for number in declared:
        for name, value in given[number].items():
            found = _place(number, name)
            for section, (cls, names) in SHARED.items():
                if found and found[0] is cls and found[1] in names:
                    given[section][found[1]] = value
    return given


def reach(overrides: dict[str, Any], parameters: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each bare name that reaches several notebooks."""
    lines = []
    for name, value in overrides.items():
        numbers = [k for k, mine in parameters.items() if k not in SHARED and name in mine and f"{k}.{name}" not in overrides]
        shared = next((section for section in SHARED if name in parameters.get(section, {})), None)
        if shared:
            lines.append(f"{name} = {value} in the {shared} of every notebook")
        elif len(numbers) > 1:
            lines.append(f"{name} = {value} in {', '.join(numbers)} (one of them alone: -p {numbers[0]}.{name} {value})")
    return lines


def _place(number: str, name: str) -> tuple[type[knobs.Config], str] | None:
    """The dataclass and field that a notebook's parameter stands for."""
    classes = config.NOTEBOOK_CONFIGS.get(number, ())
    for cls in classes:
        if name in knobs.field_types(cls):
            return cls, name
    for cls in config.CONFIGS:
        inner = name.removeprefix(f"{cls.section}_")
        if inner != name and inner in knobs.field_types(cls):
            return cls, inner
    return None


def _absolute(name: str, value: Any) -> Any:
    """A value that names a file or folder, made independent of the working directory: kernels have another one.

    Raises ValueError where the file or folder must exist and does not.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    if name in ("folder", "tta_bench", "prompt_list"):
        return str(_existing(name, value))
    if name in ("weights", "vae", "vocoder", "text", "source", *SOURCES) and Path(value).expanduser().exists():
        return str(_existing(name, value))
    return value


def _reward(name: str, spec: str) -> str:
    """A reward's line, checked (`reward_spec`), with its files as whole paths: kernels have another working directory."""
    try:
        reward_spec.check(spec)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(str(error).replace("reward=", f"{name}=", 1)) from None
    terms = [(weight, _whole(own)) for weight, own in reward_spec.terms(spec)]
    return "+".join(own if weight == 1 else f"{weight:g}*{own}" for weight, own in terms)


def _rules(spec: str) -> str:
    from resonate_lib.rewards.rules import parse_weights  # and torch with it

    parse_weights(spec)
    return spec


def _whole(own: str) -> str:
    where, _, function = own.rpartition(":")
    return f"{Path(where).expanduser().resolve()}:{function}" if where.endswith(".py") else own


def _existing(name: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.exists():
        raise ValueError(f"{name}={value!r}: there is no such file or folder; check the path (now in {Path.cwd()})")
    return path.resolve()


def _by_annotation(name: str, value: Any, annotation: str) -> Any:
    kind = KINDS.get(re.sub(r"^(typing\.)?Optional\[(.*)\]$", r"\2", annotation))
    if kind:
        return knobs.coerce(name, value, kind)
    return yaml.safe_load(value) if isinstance(value, str) else value
