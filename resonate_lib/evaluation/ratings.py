"""Human ratings of clips: TTA-Bench's MOS files in, means with intervals and agreement with a metric out (arXiv 2509.02398).

One CSV row is one rater's opinion of one clip. Common and expert raters are never mixed. Read ratings become rows like those
of `ttabench.evaluate`, with a rater where those have a seed, so that groups, robustness and fairness of `parts.py` hold for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from resonate_lib.data import prompts
from resonate_lib.evaluation import metrics, stats, ttabench

DIMENSIONS = ("complexity", "enjoyment", "quality", "alignment", "usefulness")
HEADINGS = {  # as TTA-Bench's own files write them
    "复杂度": "complexity", "喜爱度": "enjoyment", "质量": "quality", "一致性": "alignment", "实用性": "usefulness",
    "name": "file", "wav_name": "file", "clip": "file", "person_id": "rater", "id": "prompt"}  # fmt: skip
KINDS = {"common": "common", "expert": "expert", "pro": "expert"}
LOWEST, HIGHEST = 0.0, 10.0
PROBE = 0
COLUMNS = ("kind", "system", "id", "rater", *DIMENSIONS)


def read(path, *, kind: str | None = None, systems: Mapping[int, str] | None = None) -> pd.DataFrame:
    """Ratings of a CSV file, or of every CSV file in a folder: one row per rater and clip, with COLUMNS.

    A file has the five DIMENSIONS (numbers from 0 to 10, an empty cell is missing) and says which clip: `file` such as
    S001_P0001.wav, or `prompt` (or a `file` such as prompt_0001.wav) with `system`. rater: a column, else from the name of the
    file (result-<rater>.csv), else unknown (""). kind, common or expert (pro): this argument, a column, or the name of the file
    (all_mos_pro.csv). systems: names for the numbers of S001 and so on. The probe S000 is skipped. The headings of
    TTA-Bench's own files are known (HEADINGS).
    Raises ValueError that names file, line and what is allowed, also for a rater who rates a clip twice.
    """
    path = Path(path)
    files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"no ratings in {path}: give a CSV file, or a folder of them")
    found = pd.concat([_read_file(file, kind, systems or {}) for file in files], ignore_index=True)
    twice = found[(found["rater"] != "") & found.duplicated(["kind", "system", "id", "rater"])]
    if len(twice):
        line = twice.iloc[0]
        raise ValueError(f"{line['where']}: rater {line['rater']} rates {line['system']}, {line['id']} twice; keep one of them")
    return found[list(COLUMNS)]


def _read_file(file: Path, kind: str | None, systems: Mapping[int, str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:  # empty, not UTF-8, rows of unequal length
        raise ValueError(f"{file}: not a CSV file in UTF-8 ({error}): save it as one") from None
    table = table.rename(columns=lambda name: HEADINGS.get(name.strip(), name.strip().lower()))
    complete = set(DIMENSIONS) <= set(table) and {"file", "prompt"} & set(table)
    if not complete or table.columns.has_duplicates:
        raise ValueError(f"{file}: found columns {', '.join(table)}; it needs {', '.join(DIMENSIONS)}, and `file`, or `system` "
                         "and `prompt`, each once")
    by_name = re.fullmatch(r"result-(.+)", file.stem)
    lines = []
    for number, row in enumerate(table.to_dict("records"), 2):
        where = f"{file}, line {number}"
        system, prompt = _clip(row, where)
        if system == PROBE:
            continue
        lines.append({
            "where": where, "system": systems.get(system, f"S{system:03d}") if isinstance(system, int) else system, "id": prompt,
            "kind": _kind(kind or row.get("kind") or file.stem.split("_")[-1], where),
            "rater": row.get("rater", "").strip() or (by_name[1] if by_name else ""),
            **{name: _number(row[name], name, where) for name in DIMENSIONS},
        })  # fmt: skip
    return pd.DataFrame(lines, columns=["where", *COLUMNS]).astype(dict.fromkeys(DIMENSIONS, float))


def _clip(row: Mapping[str, str], where: str) -> tuple[int | str, str]:
    """System (a number, or a name as it stands) and prompt id of a line."""
    file, system, prompt = (row.get(name, "").strip() for name in ("file", "system", "prompt"))
    if re.search(r"(^|[/\\])S\d+_P", file):
        try:
            return prompts.parse_clip_name(file)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    stem = re.sub(r"\.\w+$", "", re.split(r"[/\\]", file)[-1])
    prompt = re.sub(r"^P(?=\d{4}$)", "prompt_", prompt or stem)
    if not system or not prompt:
        raise ValueError(f"{where}: file {file!r}, system {system!r}, prompt {prompt!r} name no clip; write a file like "
                         "S001_P0001.wav, or system and prompt")
    return (int(system[1:]) if re.fullmatch(r"S\d{3}", system) else system), prompt


def _kind(text: str, where: str) -> str:
    if text.strip().lower() not in KINDS:
        raise ValueError(f"{where}: kind of rater {text!r}; allowed are {', '.join(KINDS)}: add a column `kind`, pass kind, or "
                         "name the file ..._common.csv or ..._pro.csv")
    return KINDS[text.strip().lower()]


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text) if text.strip() else np.nan
    except ValueError:
        value = np.inf
    if not (LOWEST <= value <= HIGHEST or np.isnan(value)):
        raise ValueError(f"{where}: {name} is {text!r}; a number from {LOWEST:g} to {HIGHEST:g} is allowed, or nothing")
    return value


def as_rows(ratings: pd.DataFrame, records: Sequence[dict] = ()) -> pd.DataFrame:
    """Ratings as rows of the benchmark: setting "common raters" or "expert raters", seed the rater, and the prompt's columns.

    `parts.within`, `parts.robustness` and `parts.fairness` read them with the metric "quality", or any of DIMENSIONS.
    records: the prompts; without them only `metrics.summarise` and the like. ValueError for a rating whose prompt they lack.
    """
    rows = ratings.assign(setting=ratings["kind"] + " raters", seed=ratings["rater"])
    if records:
        known = {record["id"]: record for record in records}
        if strange := sorted(set(rows["id"]) - set(known)):
            raise ValueError(f"{len(strange)} rated prompts are not among the {len(known)} records, such as {strange[0]}: pass the "
                             "records of all parts")
        names = [name for name in ttabench.PROMPT_COLUMNS if name != "id"]
        fields = {name: [ttabench.prompt_field(known[key], name) for key in rows["id"]] for name in names}
        rows = rows.assign(**fields)
    return rows


def means(ratings: pd.DataFrame, *, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean of every dimension per kind of rater and system: kind, system, dimension, mean, low, high, n, prompts, raters.

    Every rating counts the same. Prompts are resampled, and raters as a second level where two or more are named; raters is 0
    where none is.
    """
    table = metrics.summarise(as_rows(ratings), ["kind", "system"], metrics=DIMENSIONS, n=n, seed=seed)
    table = table.rename(columns={"metric": "dimension", "seeds": "raters"})
    return table if (ratings["rater"] != "").any() else table.assign(raters=0)


def agreement(
    ratings: pd.DataFrame, rows: pd.DataFrame, metric: str, *, n: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Spearman correlation of a metric with the mean rating of the same clips, per kind of rater and dimension.

    rows: of `ttabench.evaluate`, of one setting; a clip here is a system and a prompt (samples and seeds together).
    Columns: kind, dimension, level, metric, mean (the correlation), low, high, n (points), prompts, systems. level "clip": a
    point per clip; "system": a point per system, over its rated clips, from three systems on. The interval resamples prompts;
    raters are taken as they are. Raises ValueError where they share no clip.
    """
    if "setting" in rows and rows["setting"].nunique() > 1:
        raise ValueError(f"rows of {rows['setting'].nunique()} settings: pass those of one, the one that was rated")
    top, bottom = metrics.parts(rows, metric)
    known = np.isfinite(top) & np.isfinite(bottom)
    sums = pd.DataFrame({"top": top, "bottom": bottom, "system": rows["system"], "id": rows["id"]})[known]
    scores = sums.groupby(["system", "id"], as_index=False).sum().query("bottom > 0")
    lines = []
    for kind, group in ratings.groupby("kind", sort=False):
        heard = group.groupby(["system", "id"], as_index=False)[list(DIMENSIONS)].mean().merge(scores, on=["system", "id"])
        if heard.empty:
            raise ValueError(f"{kind} raters heard {_some(group['system'])}, the rows hold {_some(rows['system'])}: no clip is in "
                             "both; name the systems when reading (systems={1: 'base'}) and use the same prompts")
        for dimension in DIMENSIONS:
            points = heard.dropna(subset=[dimension])
            for level in ("clip", "system"):
                if level == "clip" or points["system"].nunique() > 2:
                    value = _spearman(points, dimension, level, n=n, seed=seed)
                    counts = points["id"].nunique(), points["system"].nunique()
                    lines.append((kind, dimension, level, metric, *value, len(points) if level == "clip" else counts[1], *counts))
    names = ["kind", "dimension", "level", "metric", "mean", "low", "high", "n", "prompts", "systems"]
    return pd.DataFrame(lines, columns=names)


def _some(column: pd.Series) -> str:
    names = [str(name) for name in column.unique()]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _spearman(points: pd.DataFrame, dimension: str, level: str, *, n: int, seed: int) -> stats.Interval:
    """Over the points as they are, with the percentile interval over n resamples of the prompts (one fewer than there are)."""
    rated, top, bottom = (points[name].to_numpy(float) for name in (dimension, "top", "bottom"))
    unit, system = (pd.factorize(points[name])[0] for name in ("id", "system"))
    prompts_heard = unit.max(initial=-1) + 1

    def correlation(times: np.ndarray) -> float:
        if level == "clip":
            index = np.repeat(np.arange(len(unit)), times[unit])
            return _rank_correlation(rated[index], top[index] / bottom[index])
        weight = times[unit].astype(float)
        total, a, b, below = (np.bincount(system, weight * x) for x in (np.ones(len(unit)), rated, top, bottom))
        there = (total > 0) & (below > 0)
        return _rank_correlation(a[there] / total[there], b[there] / below[there])

    value = correlation(np.ones(prompts_heard, int))
    if prompts_heard < 3 or not np.isfinite(value):
        return stats.Interval(value, np.nan, np.nan)
    even = np.full(prompts_heard, 1 / prompts_heard)
    draws = np.random.default_rng(seed).multinomial(prompts_heard - 1, even, size=n)
    drawn = np.array([correlation(times) for times in draws])
    low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
    return stats.Interval(value, float(low), float(high))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank; nan where one side is constant."""
    a, b = rankdata(a), rankdata(b)
    a, b = a - a.mean() if len(a) else a, b - b.mean() if len(b) else b
    spread = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread > 0 else float("nan")
