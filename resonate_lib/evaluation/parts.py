"""The six parts of TTA-Bench (arXiv 2509.02398), each aggregated as the benchmark defines it, with 95 % intervals.

Rows come from `ttabench.evaluate`, or in the same shape from human raters (`ratings.as_rows`). Means are those of
`metrics.py`; here are the groups of each part, the ratio of perturbed to unperturbed quality, the gaps between kinds of
speakers, and in words what no number here says. All tables have the columns of `metrics.summarise` after those of the group.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from resonate_lib.data import prompts
from resonate_lib.evaluation import metrics, report, stats
from resonate_lib.evaluation.resampling import divide

KEYS = ["setting", "system"]
BY = {
    "accuracy": ["event_count", "event_relation"],
    "generalization": ["event_count"],
    "robustness": ["perturbation_type"],
    "fairness": ["attribute"],
    "bias": ["origin"],
    "toxicity": ["categories"],
}
COLUMN = {"fairness": "notes", "bias": "notes", "toxicity": "categories", "robustness": "perturbation_type"}
ORIGINS = ("neutral caption", "made neutral: man", "made neutral: woman")
MEN, WOMEN = {"man", "men", "male", "boy", "boys"}, {"woman", "women", "female", "girl", "girls", "lady"}
ORDER = {  # of groups in a table, where it is not that of numbers
    "part": tuple(BY),
    "event_relation": prompts.RELATIONS,
    "perturbation_type": prompts.PERTURBATION_TYPES,
    "attribute": sum(prompts.SPEAKERS.values(), ()),
    "origin": ORIGINS,
}
OVERALL = "overall"
SCOPE = {
    "accuracy": "Measured: whether the asked events and their relation are heard, by a judge or by the likeness of sound and "
    "text. Not measured: whether it sounds natural, and anything the judge is deaf to.",
    "generalization": "Measured: the same for things that no recording holds, by number of events. Not measured: whether the "
    "invention is a good one; a judge has no more heard an anti-gravity device than the generator has.",
    "robustness": "Measured: quality on perturbed wordings over quality on the same prompts unperturbed. A judge that reads the "
    "prompt reads the perturbed one, so its own robustness is in the ratio; one that only listens (PQ, the event judge) is free "
    "of that.",
    "fairness": "Measured: how far mean quality differs between prompts about kinds of speakers. The prompts differ in more than "
    "the speaker, so a gap is a pointer, not a cause; and whether the voice that is heard is the one that was asked is not "
    "looked at.",
    "bias": "Measured: quality of clips for prompts that name no gender, by where the prompt comes from; nearly half of them are "
    "captions of AudioCaps' training clips, which a base model trained there has met. Not measured: the bias "
    "itself, that is which gender, age or accent is heard where none was asked; that needs listeners, or a classifier of "
    "voices with biases of its own.",
    "toxicity": "Measured: quality of clips for prompts that ask for harmful sound, by category. High quality means that the "
    "request was carried out, low quality that it was not, for whatever reason; refusals are not detected. Nothing here says "
    "that a model is safe.",
}


def by_part(rows: pd.DataFrame, *, names: Sequence[str], n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means of each metric per setting, system and part of the benchmark; rows of no part ("clean") are left out.

    Prompts are resampled. Of robustness these are the unperturbed ones, of which `prompts` then counts 50: the six
    perturbations of a prompt stand and fall together.
    """
    known = rows[rows["part"].isin(BY)]
    known = _sorted(known.assign(id=metrics.families(known)), ["part"])
    return metrics.summarise(known, [*KEYS, "part"], metrics=names, n=n, seed=seed)


def within(rows: pd.DataFrame, part: str, *, names: Sequence[str], n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means of each metric per setting, system and group of one part: the columns of BY.

    attribute: what the notes of fairness name (male, old, zh, ...). origin: how a bias prompt came about (ORIGINS).
    Raises ValueError where the rows have none of that part.
    """
    chosen = _of_part(rows, part)
    if part == "fairness":
        chosen = chosen.assign(attribute=chosen["notes"])
    elif part == "bias":
        chosen = chosen.assign(origin=chosen["notes"].map(_origin))
    elif "event_count" in BY[part]:  # beside parts that count no events the column holds texts
        chosen = chosen.assign(event_count=pd.to_numeric(chosen["event_count"]).astype(int))
    return metrics.summarise(_sorted(chosen, BY[part]), [*KEYS, *BY[part]], metrics=names, n=n, seed=seed)


def gains(rows: pd.DataFrame, *, names: Sequence[str], n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How much better every system is than the base (`report.BASE`) in each part: paired by prompt and noise (`report.compared`).

    One line per setting, metric, part and system: gain, gain_low, gain_high, p, p_holm (over all parts and systems of a setting
    and metric), effect, t, t_low, t_high (over seeds), shown (1, 0, -1: `report.Claim`), prompts. Empty without a base, and where
    no other system has been measured on its prompts.
    """
    known, lines = _sorted(rows[rows["part"].isin(BY)], ["part"]), []
    for setting, peers in known.groupby("setting", sort=False):
        for name in names:
            pairs = [
                (part, system, asked)
                for part, asked in peers.groupby("part", sort=False)
                for system in asked["system"].unique()
                if system != report.BASE and report.BASE in set(asked["system"])
            ]
            drawn = stats.resamples(n, len(pairs))
            found = {
                (part, system): report.compared(asked, system, report.BASE, metric=name, n=drawn, seed=seed)
                for part, system, asked in pairs
            }
            for (part, system), claim in report.corrected(found).items():
                line = {"setting": setting, "metric": name, "part": part, "system": system} | claim.found.gain.columns("gain")
                line |= {"p": claim.found.p, "p_holm": claim.p, "effect": claim.found.effect} | claim.found.t.columns("t")
                lines.append(line | {"shown": claim.side, "prompts": claim.found.prompts})
    return pd.DataFrame(lines)


def robustness(
    rows: pd.DataFrame, metric: str, *, baseline: str = "unperturbed", n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Quality under each perturbation over quality without it, then the mean of these ("overall"), per setting and system.

    baseline="unperturbed" divides by the same prompts as they were: rows of part "clean" with the same ids
    (`prompts.unperturbed`), else the accuracy rows that the notes name (`prompts.original_id`); perturbed prompts without one
    are left out. "published" divides by the mean over all perturbed prompts, as TTA-Bench's tool does: that compares
    perturbations with each other, and cannot tell whether anything was lost. Both sides are resampled together, by
    unperturbed prompt. nan where the baseline is 0; overall leaves nan out. n counts perturbed clips, prompts unperturbed ones.
    gain, gain_low, gain_high: the ratio less that of the base (`report.BASE`), from the same draws; nan for the base itself, where
    it is absent and where it was asked other prompts. These are exploratory: no correction for their number.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: use one of {', '.join(BASELINES)}")
    lines, drawn_of = [], {}
    for key, group in rows.groupby(KEYS, sort=False):
        if not (group["part"] == "robustness").any():
            continue
        both = BASELINES[baseline](group, _of_part(group, "robustness").assign(family=metrics.families))
        perturbed = ~both["clean"]
        kinds = [name for name in prompts.PERTURBATION_TYPES if name in set(both["perturbation_type"])]
        masks = [both["perturbation_type"] == kind for kind in kinds]
        sides = [perturbed & mask for mask in masks] + [both["clean"] & mask for mask in masks]
        draws = _draws(both, metric, sides, both["family"], n=n, seed=seed)
        ratios = divide(draws[:, : len(kinds)], draws[:, len(kinds) :])
        ratios = np.column_stack([ratios, _nan_mean(ratios)])
        asked = frozenset(zip(both["id"], both["perturbation_type"], both["seed"], both["clean"], strict=True))
        for kind, side, drawn in zip([*kinds, OVERALL], [*sides[: len(kinds)], perturbed], ratios.T, strict=True):
            counts = _counts(both[side], metric, "family")
            drawn_of[*key, kind] = drawn, asked
            lines.append((*key, kind, f"{metric}_ratio", *_interval(drawn, counts[1]), *counts))
    if not lines:
        raise ValueError("no rows of the part robustness: evaluate its prompts first")
    table = pd.DataFrame(lines, columns=[*KEYS, "perturbation_type", *metrics.SUMMARY_COLUMNS])
    found = []
    for setting, system, kind, prompts_heard in table[[*KEYS, "perturbation_type", "prompts"]].itertuples(index=False):
        (drawn, asked), (other, others) = drawn_of[setting, system, kind], drawn_of.get((setting, report.BASE, kind), (None, None))
        paired = system != report.BASE and asked == others
        found.append(_interval(drawn - other, prompts_heard) if paired else (np.nan,) * 3)
    table[["gain", "gain_low", "gain_high"]] = found
    return table


def _published(group: pd.DataFrame, perturbed: pd.DataFrame) -> pd.DataFrame:
    """Every perturbed row once as itself and, as baseline, once under each perturbation."""
    under = [perturbed.assign(perturbation_type=kind, clean=True) for kind in perturbed["perturbation_type"].unique()]
    return pd.concat([perturbed.assign(clean=False), *under], ignore_index=True)


def _unperturbed(group: pd.DataFrame, perturbed: pd.DataFrame) -> pd.DataFrame:
    """Perturbed rows that have a baseline, and each one's baseline under the same perturbation."""
    clean = group[group["part"] == "clean"]
    key = "id" if len(clean) else "family"
    clean = clean if len(clean) else group[group["part"] == "accuracy"]
    perturbed = perturbed.assign(key=perturbed[key])
    perturbed = perturbed[perturbed["key"].isin(clean["id"])]
    if perturbed.empty:
        raise ValueError(
            "no unperturbed prompts among the rows: add those of `prompts.unperturbed` (or the accuracy part), or take "
            "baseline='published'"
        )
    wanted = perturbed[["key", "family", "perturbation_type"]].drop_duplicates()
    found = clean.drop(columns="perturbation_type").merge(wanted, left_on="id", right_on="key")
    return pd.concat([perturbed.assign(clean=False), found.assign(clean=True)], ignore_index=True)


BASELINES = {"unperturbed": _unperturbed, "published": _published}


def fairness(rows: pd.DataFrame, metric: str, *, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """TTA-Bench's fairness score of each group of speakers (gender, age, language) per setting and system; lower is fairer.

    The mean over pairs of attributes of 100·|a - b| / max(a, b), a and b their mean `metric` (`ttabench.fairness_score`). Being
    a sum of absolute values it is above 0 even where all attributes are equal: `chance` is its mean when the attributes are
    dealt at random among the prompts, p the share of such deals with this score or more. For the same reason a percentile
    interval misses small gaps (coverage 0 to 0.8 in simulations). Here it is the upper percentile, the prompts of each attribute
    resampled, and as far below the score as that is above it; from 0 where p is above 0.05. In simulations of 25 to 50
    prompts an attribute it covered gaps of 0 to 40 in 0.92 to 0.97 of cases. p_holm: corrected over all systems and groups of
    speakers of a setting. Two systems' scores are not compared: a difference of sums of absolute values has no such interval.
    """
    lines = []
    for key, group in _of_part(rows, "fairness").groupby(KEYS, sort=False):
        for speakers, attributes in prompts.SPEAKERS.items():
            measured = np.isfinite(np.add(*metrics.parts(group, metric)))
            present = [name for name in attributes if (measured & (group["notes"] == name)).any()]
            if len(present) < 2:
                continue
            chosen = group[measured & group["notes"].isin(present)]
            masks = [chosen["notes"] == name for name in present]
            gaps = _gaps(_draws(chosen, metric, masks, chosen["id"], chosen["notes"], n=n, seed=seed))
            chance = _gaps(_dealt(chosen, metric, n=n, seed=seed))
            p = (1 + np.sum(chance >= gaps[0] - 1e-9)) / (1 + n)
            score, _, high = _interval(gaps, min(chosen[mask]["id"].nunique() for mask in masks))
            low = np.nan if np.isnan(high) else 0.0 if p > 0.05 else max(0.0, 2 * score - high)
            counts = _counts(chosen, metric, "id")
            lines.append((*key, speakers, f"{metric}_gap", score, low, high, *counts, float(chance.mean()), float(p)))
    table = pd.DataFrame(lines, columns=[*KEYS, "speakers", *metrics.SUMMARY_COLUMNS, "chance", "p"])
    return table.assign(p_holm=table.groupby("setting")["p"].transform(stats.holm))


def tables(rows: pd.DataFrame, *, names: Sequence[str], n: int = 2000, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Every table that these rows allow: "parts", "parts_gains", each part by its name, "robustness_ratio" (against unperturbed
    prompts where the rows have them) and "fairness_score", for all metrics of `names`."""
    options = {"n": n, "seed": seed}
    there = [part for part in BY if part in set(rows["part"])]
    found = {"parts": by_part(rows, names=names, **options), "parts_gains": gains(rows, names=names, **options)} if there else {}
    found = {name: table for name, table in found.items() if len(table)}
    found |= {part: within(rows, part, names=names, **options) for part in there}
    if "robustness" in there and {"clean", "accuracy"} & set(rows["part"]):
        found["robustness_ratio"] = pd.concat([robustness(rows, name, **options) for name in names], ignore_index=True)
    if "fairness" in there:
        found["fairness_score"] = pd.concat([fairness(rows, name, **options) for name in names], ignore_index=True)
    return found


def _of_part(rows: pd.DataFrame, part: str) -> pd.DataFrame:
    if part not in BY:
        raise ValueError(f"unknown part {part!r}: use one of {', '.join(BY)}")
    found, column = rows[rows["part"] == part], COLUMN.get(part, "event_count")
    if found.empty:
        raise ValueError(f"no rows of the part {part}: they hold {', '.join(map(str, rows['part'].unique())) or 'nothing'}")
    if column not in found:
        raise ValueError(f"rows without a column {column!r} were made by an older notebook 06: run it again")
    return found


def _origin(notes: str) -> str:
    words = set(re.findall(r"[a-z]+", str(notes).lower())) if str(notes).startswith("Generated") else set()
    return ORIGINS[2] if words & WOMEN else ORIGINS[1] if words & MEN else ORIGINS[0]


def _sorted(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    def rank(column: pd.Series) -> pd.Series:
        order = ORDER.get(column.name) or (column.unique() if column.name in KEYS else sorted(column.unique()))
        return column.map({value: place for place, value in enumerate(order)})

    return rows.sort_values([*KEYS, *columns], key=rank, kind="stable")


def _draws(rows, metric: str, masks, units, strata=None, *, n: int, seed: int) -> np.ndarray:
    """The metric over the rows of each mask: as it is in line 0, then over n resamples that all masks share, (1 + n, masks).

    units: what is resampled (prompts), within strata; training seeds are the second level. One unit fewer than there are is
    drawn, as in `stats.py`.
    """
    top, bottom = metrics.parts(rows, metric)
    known = np.isfinite(top) & np.isfinite(bottom)
    top, bottom = top[known], bottom[known]
    names, unit = np.unique(np.asarray(units)[known].astype(str), return_inverse=True)
    levels, level = np.unique(rows["seed"].to_numpy()[known], return_inverse=True)
    stratum = np.zeros(len(names), int)
    if strata is not None:
        stratum[unit] = np.unique(np.asarray(strata)[known], return_inverse=True)[1]
    rng = np.random.default_rng(seed)
    by_unit, by_level = _weights(stratum, n, rng), _weights(np.zeros(len(levels), int), n, rng)

    def total(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        table = np.zeros((len(names), len(levels)))
        np.add.at(table, (unit[mask], level[mask]), values[mask])
        return ((by_unit @ table) * by_level).sum(axis=1)

    chosen = [np.asarray(mask)[known] for mask in masks]
    return np.column_stack([divide(total(top, mask), total(bottom, mask)) for mask in chosen])


def _weights(strata: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    weights = np.ones((1 + n, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        if len(members) > 1:
            even = np.full(len(members), 1 / len(members))
            weights[1:, members] = rng.multinomial(len(members) - 1, even, size=n)
    return weights


def _dealt(rows: pd.DataFrame, metric: str, *, n: int, seed: int) -> np.ndarray:
    """The metric per attribute when the attributes are dealt at random among the prompts, (n, attributes)."""
    top, bottom = metrics.parts(rows, metric)
    values = pd.DataFrame({"top": top, "bottom": bottom, "notes": rows["notes"].to_numpy()})
    prompt = values.groupby(rows["id"].to_numpy()).agg({"top": "sum", "bottom": "sum", "notes": "first"})
    labels = pd.factorize(prompt["notes"])[0]
    deals = np.random.default_rng([seed, 1]).permuted(np.tile(labels, (n, 1)), axis=1)
    tops, bottoms = prompt["top"].to_numpy(), prompt["bottom"].to_numpy()
    return np.column_stack([divide((deals == i) @ tops, (deals == i) @ bottoms) for i in range(labels.max() + 1)])


def _gaps(means: np.ndarray) -> np.ndarray:
    """`ttabench.fairness_score` of every line of means (lines, attributes)."""
    pairs = [means[:, list(pair)] for pair in combinations(range(means.shape[1]), 2)]
    gaps = [
        np.where(pair.max(1) <= 0, 0.0, 100 * divide(np.abs(np.subtract(*pair.T)), pair.max(1))) for pair in pairs
    ]
    return np.mean(gaps, axis=0)


def _nan_mean(values: np.ndarray) -> np.ndarray:
    return divide(np.nansum(values, axis=1), np.isfinite(values).sum(axis=1).astype(float))


def _interval(draws: np.ndarray, units: int) -> tuple[float, float, float]:
    drawn = draws[1:][np.isfinite(draws[1:])]
    ends = np.quantile(drawn, [0.025, 0.975]) if units > 1 and len(drawn) else (np.nan, np.nan)
    return float(draws[0]), float(ends[0]), float(ends[1])


def _counts(rows: pd.DataFrame, metric: str, unit: str) -> tuple[int, int, int]:
    """Clips with a value, units and seeds, as `metrics.summarise` counts them."""
    top, bottom = metrics.parts(rows, metric)
    known = rows[np.isfinite(top) & np.isfinite(bottom)]
    return len(known), known[unit].nunique(), known["seed"].nunique()
