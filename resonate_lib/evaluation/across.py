"""Versions of the suite against each other: what differs in their configurations, and their benchmark rows system by system.

Rows are read from `metrics/tta_rows.csv` and `tta_parts_rows.csv` of every seed (notebook 06). Where two versions share clips
(the same prompt from the same noise, in the same setting) the difference is paired; else each side keeps its own prompts, and
the interval is wider.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resonate_lib import versions
from resonate_lib.evaluation import metrics, report, stats
from resonate_lib.evaluation.suite import measured
from resonate_lib.evaluation.tables import with_intervals

METRICS = (*metrics.HEADLINE, *metrics.FURTHER)
CLIP = ["seed", "id", "sample"]
VERDICT = {1: "better", 0: "–", -1: "worse"}


def sections(given: Sequence[str | os.PathLike], results: str | os.PathLike | None = None) -> list[tuple[str, pd.DataFrame]]:
    """Titled tables about two or more versions (number, name or folder): configuration, seconds, then the benchmark by metric.

    The first version is what the others are compared with. Two versions without benchmark rows get the metrics files that they
    share side by side instead. Raises ValueError for fewer than two, for one named twice, and for one that is not there.
    """
    folders = [_folder(version, results) for version in given]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ValueError(f"compare {' '.join(map(str, given))}: name two or more different versions")
    labels = dict(zip(_labels(folders), folders, strict=True))
    runs = {label: versions.read(folder) for label, folder in labels.items() if (folder / "run.json").is_file()}
    unknown = "".join(f"; that of {label} is not known (no run.json)" for label in labels if label not in runs)
    found = [(f"configuration that differs{unknown}", versions.differences(runs))]
    found.append(("seconds per notebook", _seconds(runs)))
    rows = {label: _rows(folder) for label, folder in labels.items()}
    known = {label: table for label, table in rows.items() if table is not None}
    without = ", ".join(label for label in labels if label not in known)
    if len(known) > 1:
        names = [name for name in METRICS if all(measured(table, name) for table in known.values())]
        left = f" ({without}: no benchmark rows)" if without else ""
        return found + [(_title(name, next(iter(known))) + left, readable(compare(known, name))) for name in names]
    if len(folders) == 2 and len(runs) == 2:
        tables = versions.compare(*folders)
        return found + [(name, table) for name, table in tables.items() if name not in ("config", "time")]
    raise ValueError(f"no benchmark rows (metrics/tta_rows.csv) in {without}: run notebook 06 in two or more of these versions")


def compare(rows: Mapping[str, pd.DataFrame], metric: str = "exact", *, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One line per setting, system and later version: `metric` there, in the first version, and the difference, there - first.

    rows: benchmark rows by name of version. Columns: setting, system, version, first, this and gain with their 95 % intervals
    (_low, _high), p, p_holm (over all differences of a setting), effect, t, t_low, t_high, shown (1, 0, -1: `report.Claim`) and
    clips, which says what was compared. Systems and settings that the first version has not are left out.
    """
    first, *others = rows
    lines = []
    for setting, old in rows[first].groupby("setting", sort=False):
        found, about = {}, {}
        there = {other: set(table[table["setting"] == setting]["system"]) for other, table in rows.items()}
        shared = {other: [name for name in old["system"].unique() if name in there[other]] for other in others}
        drawn = stats.resamples(n, sum(map(len, shared.values())))
        for other in others:
            new = rows[other][rows[other]["setting"] == setting]
            for system in shared[other]:
                sides = [table[table["system"] == system] for table in (new, old)]
                found[system, other], about[system, other] = _compared(*sides, metric, n=drawn, seed=seed)
        for (system, other), claim in report.corrected(found).items():
            line = {"setting": setting, "system": system, "version": other} | about[system, other]
            line |= claim.found.gain.columns("gain") | {"p": claim.found.p, "p_holm": claim.p, "effect": claim.found.effect}
            lines.append(line | claim.found.t.columns("t") | {"shown": claim.side})
    if not lines:
        raise ValueError(f"{', '.join(rows)} share no system in one setting: compare versions of the same systems")
    return pd.DataFrame(lines)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s table as text for the eye; over several seeds with Student's interval beside the bootstrap's."""
    texts = with_intervals(table, signed=("gain", "t"))
    shown = texts[["setting", "system", "version", "first", "this", "gain"]].rename(columns={"gain": "difference"})
    if table["t_low"].notna().any():
        shown["over seeds (t)"] = texts["t"]
    shown["p"] = [report.p_text(p) for p in table["p_holm"]]
    shown["effect"] = [report.effect_text(value) for value in table["effect"]]
    shown["shown"] = [VERDICT[side] for side in table["shown"]]
    return shown.assign(clips=table["clips"])


def _compared(new: pd.DataFrame, old: pd.DataFrame, metric: str, *, n: int, seed: int) -> tuple[stats.Comparison, dict[str, Any]]:
    """The difference new - old of one system, and a line's columns about both sides."""
    pair = _shared(new, old)
    if pair is not None:
        new, old = pair
        both = (*metrics.parts(new, metric), *metrics.parts(old, metric))
        found = stats.compare(*both, metrics.families(new), new["seed"], n=n, seed=seed)
        clips = f"paired: {new['id'].nunique()} prompts, {_seeds(new)}"
    else:
        sides = [(*metrics.parts(side, metric), metrics.families(side), side["seed"]) for side in (new, old)]
        found = stats.compare_apart(*sides, n=n, seed=seed)
        clips = " against ".join(f"{side['id'].nunique()} prompts, {_seeds(side)}" for side in (new, old))
        clips = f"unpaired: {clips}"
    values = {name: metrics.measure(side, metric, n=n, seed=seed) for name, side in (("first", old), ("this", new))}
    return found, {"clips": clips} | values["first"].columns("first") | values["this"].columns("this")


def _shared(new: pd.DataFrame, old: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The clips of both sides with the same prompt and noise, in one order; None where they are under half of the fewer."""
    a, b = new.set_index(CLIP), old.set_index(CLIP)
    for name, side in (("one version", a), ("the first version", b)):
        if not side.index.is_unique:
            raise ValueError(f"{name} has two rows for one system, prompt, sample and seed: drop the copies before comparing")
    common = a.index.intersection(b.index)
    a, b = a.loc[common], b.loc[common]
    # best-of keeps the noise of its winner, which says nothing about the candidates' noise; of originals there is none
    noise = np.isclose(a["noise_seed"].astype(float), b["noise_seed"].astype(float), rtol=0, equal_nan=True)
    noise |= a["system"].str.startswith("best of ").to_numpy(bool)
    same = noise & (a["prompt_text"].to_numpy() == b["prompt_text"].to_numpy())
    if not same.any() or 2 * same.sum() < min(len(new), len(old)):
        return None
    return a[same].reset_index(), b[same].reset_index()


def _seeds(rows: pd.DataFrame) -> str:
    number = rows["seed"].nunique()
    return f"{number} seed{'' if number == 1 else 's'}"


def _title(metric: str, first: str) -> str:
    return (f"{metric}, against {first} (first); 95 % intervals, p after Holm's correction over a setting's differences; shown: "
            "interval and, over seeds, t clear of 0, p < 0.05")  # fmt: skip


def _folder(version: str | os.PathLike, results: str | os.PathLike | None) -> Path:
    folder = Path(version)
    if (folder / "metrics" / "tta_rows.csv").is_file():  # a scratch folder, or one seed of a version, has no run.json
        return folder.resolve()
    return versions.find(version, results)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest names that tell the versions apart: number, folder's name, path."""
    names = [path.name for path in folders]
    numbers = [name.split("-")[0] if versions.NAME.fullmatch(name) else name for name in names]
    return next(found for found in (numbers, names, [str(path) for path in folders]) if len(set(found)) == len(folders))


def _rows(folder: Path) -> pd.DataFrame | None:
    """The benchmark's rows of a version; those of its other parts under settings of their own ("guidance 1, robustness")."""
    try:
        rows = versions.read_rows(folder)
    except FileNotFoundError:
        return None
    try:
        others = versions.read_rows(folder, "tta_parts_rows")
    except FileNotFoundError:
        return rows
    return pd.concat([rows, others.assign(setting=others["setting"] + ", " + others["part"])], ignore_index=True)


def _seconds(runs: Mapping[str, dict[str, Any]]) -> pd.DataFrame:
    spent = {label: {key: item.get("seconds") for key, item in run.get("notebooks", {}).items()} for label, run in runs.items()}
    notebooks = dict.fromkeys(key for values in spent.values() for key in values)
    lines = [{"notebook": key, **{label: values.get(key) for label, values in spent.items()}} for key in notebooks]
    return pd.DataFrame(lines, columns=["notebook", *spent])
