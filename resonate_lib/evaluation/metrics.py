"""Metrics of a set of clips and the table of them: event F1, exact match, order accuracy, scores, audio sanity, variety.

Each metric of rows is a sum over clips divided by a sum over clips, so one bootstrap serves all of them. Counts per clip come
from the judge (`judge.py`), rows from the benchmark (`ttabench.py`), intervals from `stats.py`. Duplicates and diversity look at
pairs of clips of one set; sets against real ones are in `distance.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from resonate_lib import audio as audio_io
from resonate_lib.data import prompts
from resonate_lib.evaluation import stats
from resonate_lib.evaluation.embedders import Clips

NAN = float("nan")
DUPLICATE = 0.95  # cosine of fingerprints
CHUNK = 1024  # clips compared with all others at a time
SUMMARY_COLUMNS = ("metric", "mean", "low", "high", "n", "prompts", "seeds")

Parts = tuple[np.ndarray, np.ndarray]


def event_f1(tp, fp, fn) -> float:
    """Micro F1 over events: 2·tp / (2·tp + fp + fn) with the counts summed over all clips; nan when nothing is counted.

    tp, fp, fn (M,): occurrences heard and asked, heard but not asked, asked but not heard; nan clips are left out.
    """
    top, bottom = _f1_parts(np.asarray(tp, float), np.asarray(fp, float), np.asarray(fn, float))
    return _ratio(top, bottom)


def _f1_parts(tp, fp, fn) -> Parts:
    return 2 * tp, 2 * tp + fp + fn


def _mean_parts(values) -> Parts:
    return values, np.where(np.isfinite(values), 1.0, NAN)


def _ratio(top, bottom) -> float:
    known = np.isfinite(top) & np.isfinite(bottom)
    total = float(np.sum(bottom[known]))
    return float(np.sum(top[known])) / total if total else NAN


def _column(rows: pd.DataFrame, name: str) -> np.ndarray:
    if name not in rows:
        raise ValueError(f"no column {name!r}: the rows have {', '.join(map(str, rows.columns))}")
    return pd.to_numeric(rows[name]).to_numpy(float)


def _f1_of(suffix: str, rows: pd.DataFrame) -> Parts:
    counts = [_column(rows, key + suffix) for key in ("tp", "fp", "fn")]
    return _f1_parts(*counts)


def _f1_procedural(rows: pd.DataFrame) -> Parts:
    return _f1_parts(*(_column(rows, key) - _column(rows, key + "_real") for key in ("tp", "fp", "fn")))


# metrics that are not the plain mean of a column
RATIOS: dict[str, Callable[[pd.DataFrame], Parts]] = {
    "event_f1": lambda rows: _f1_of("", rows),
    "event_f1_real": lambda rows: _f1_of("_real", rows),
    "event_f1_procedural": _f1_procedural,
}
HEADLINE = ("exact", "event_f1", "order", "reward", "aqa", "clap")
FURTHER = ("reward_clap", "fine", "fine_events", "fine_relation", "ms_clap", "CE", "CU", "PC", "PQ")  # where they are measured
DEFAULT = (
    "exact",
    "event_f1",
    "event_f1_real",
    "event_f1_procedural",
    "order",
    "reward",
    "aqa",
    "clap",
    "silent",
    "clipping",
)


def parts(rows: pd.DataFrame, metric: str) -> Parts:
    """Numerator and denominator (M,) of a metric for each row; a name not in RATIOS is the mean of that column."""
    return RATIOS[metric](rows) if metric in RATIOS else _mean_parts(_column(rows, metric))


def families(rows: pd.DataFrame) -> list[str]:
    """What is resampled of each row: the unperturbed prompt where several rows stem from one (robustness), else the prompt."""
    notes = rows["notes"] if "notes" in rows else [""] * len(rows)
    return [prompts.original_id(name, note) or name for name, note in zip(rows["id"], notes, strict=True)]


def measure(rows: pd.DataFrame, metric: str, *, n: int = 2000, seed: int = 0) -> stats.Interval:
    """One metric of the rows with its 95 % interval: prompts (id) resampled, training seeds as second level."""
    top, bottom = parts(rows, metric)
    return stats.bootstrap_ratio(top, bottom, rows["id"], seeds=rows["seed"], n=n, seed=seed)


def summarise(
    rows: pd.DataFrame, by: Sequence[str] = (), *, metrics: Sequence[str] = DEFAULT, n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Metrics with 95 % intervals for every group of rows, one line per group and metric.

    Returns the columns of `by`, then metric, mean, low, high, n (clips with a value), prompts, seeds. The order of
    groups is that of their first row. A metric without any value in a group is nan with n=0.
    """
    by = list(by)
    lines = []
    groups = rows.groupby(by, sort=False, dropna=False) if by else [((), rows)]
    for key, group in groups:
        key = key if isinstance(key, tuple) else (key,)
        for metric in metrics:
            top, bottom = parts(group, metric)
            known = np.isfinite(top) & np.isfinite(bottom)
            value = measure(group, metric, n=n, seed=seed)
            counts = (int(known.sum()), group["id"][known].nunique(), group["seed"][known].nunique())
            lines.append((*key, metric, *value, *counts))
    return pd.DataFrame(lines, columns=[*by, *SUMMARY_COLUMNS])


def sanity(waveforms, sample_rate: int) -> dict[str, np.ndarray]:
    """Per clip of (B, T): peak_dbfs, silent (peak under -50 dBFS), clipping (3 neighbours at 0.999), loudness (LUFS).

    Look at the sound before any clamp. Loudness is nan for silence and for clips under 0.4 s.
    """
    long_enough = waveforms.shape[-1] >= 0.4 * sample_rate
    return {
        "peak_dbfs": np.array([audio_io.peak_dbfs(w) for w in waveforms]),
        "silent": np.array([audio_io.is_silent(w) for w in waveforms]),
        "clipping": np.array([audio_io.is_clipping(w) for w in waveforms]),
        "loudness": np.array([audio_io.loudness(w, sample_rate) if long_enough else NAN for w in waveforms]),
    }


def nearest_cosine(vectors) -> np.ndarray:
    """The highest cosine of each vector (M, D) to another one of the set (M,); of a vector of zeros it is 0."""
    vectors = _unit(vectors)
    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} clips: whether one is like another takes two or more")
    found = []
    for start in range(0, len(vectors), CHUNK):
        cosines = vectors[start : start + CHUNK] @ vectors.T
        cosines[np.arange(len(cosines)), start + np.arange(len(cosines))] = -1  # itself
        found.append(cosines.max(axis=1))
    return np.concatenate(found)


def duplicates(prints, *, threshold: float = DUPLICATE) -> np.ndarray:
    """Which clips have a near-identical one in their set (M,) bool: fingerprints (M, D) with a cosine of `threshold` or more.

    prints: `embedders.fingerprint` of all clips of one system, whatever prompt or noise they came from. Silent clips are no
    copies of each other: they are counted as silent. The default threshold calls 2 of 1,500 original scenes copies; of 200 planted
    ones it finds all that are quieter or have noise 20 dB below them, 0.98 of those through the codec, 0.68 of those 20 ms later.
    """
    return nearest_cosine(prints) >= threshold


def duplicate_share(found, ids) -> stats.Interval:
    """The share of clips that have a duplicate, with a 95 % interval; found (M,) bool as of `duplicates`, ids (M,) prompts.

    Duplicates come two at a time, or a prompt at a time, so the clips are not independent: Wilson's interval with half as many
    trials as clips, or with the number of prompts where that is less. The share grows with the number of clips: compare equal ones.
    """
    found = np.asarray(found, bool)
    trials = min(len(found) / 2, len(set(ids)))
    return stats.wilson(found.mean() * trials, trials) if len(found) else stats.Interval(NAN, NAN, NAN)


def diversity(vectors, ids, *, n: int = 2000, seed: int = 0) -> stats.Interval:
    """Mean of 1 - cosine over pairs of clips of one prompt, then over prompts, with a bootstrap interval over prompts.

    vectors (M, D): any embedding; ids (M,). Prompts with one clip do not count; nan where no prompt has two. Wrong clips differ
    too, so more is not better: read it beside that of originals of the same prompts.
    """
    ids, vectors = np.asarray(ids), _unit(vectors)
    heard = vectors.any(axis=1)  # the fingerprint of silence is zero, which is like nothing and no variety
    ids, vectors, values = ids[heard], vectors[heard], []
    for identity in np.unique(ids):
        siblings = vectors[ids == identity]
        if (count := len(siblings)) > 1:
            values.append(1 - ((siblings.sum(axis=0) ** 2).sum() - (siblings**2).sum()) / (count * (count - 1)))
    return stats.bootstrap_mean(values, n=n, seed=seed)


def _unit(vectors) -> np.ndarray:
    vectors = np.asarray(vectors, float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def variety_table(prints: Sequence[Clips], sounds: Sequence[Clips], *, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """One line a system: the share of its clips that have a duplicate, and the diversity of siblings, with 95 % intervals.

    prints: fingerprints of each system's clips; sounds: the same clips in the space that diversity is measured in.
    Columns: system, clips, prompts, threshold, duplicates, duplicates_low, duplicates_high, embedding, diversity, diversity_low,
    diversity_high.
    """
    lines = []
    for print_, sound in zip(prints, sounds, strict=True):
        if (print_.name, len(print_.ids)) != (sound.name, len(sound.ids)):
            raise ValueError(f"fingerprints of {print_.name!r} beside vectors of {sound.name!r}: pass the same sets in one order")
        share = duplicate_share(duplicates(print_.vectors), print_.ids)
        spread = diversity(sound.vectors, sound.ids, n=n, seed=seed)
        line = {"system": sound.name, "clips": len(sound.ids), "prompts": len(set(sound.ids)), "threshold": DUPLICATE}
        line |= dict(zip(("duplicates", "duplicates_low", "duplicates_high"), share, strict=True)) | {"embedding": sound.embedding}
        lines.append(line | dict(zip(("diversity", "diversity_low", "diversity_high"), spread, strict=True)))
    return pd.DataFrame(lines)
