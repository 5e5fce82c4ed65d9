"""How far a reward agrees with the truth: on scenes whose captions are right or wrong by construction, and on generated
clips with the independent judge.

Pure numbers and tables; the pictures are in `plots.py`. A reward may be any callable of `rewards.base.Reward`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from resonate_lib.evaluation import stats

TRUE = "true"
ALL = "all kinds"
CHUNK = 256  # clips heard at a time: 65 MB of sound at 4 s and 16 kHz, 450 MB at 10 s and 44.1 kHz


def score_captions(rewards: Mapping[str, object], corpus, *, wrong: Callable, seed: int = 0) -> pd.DataFrame:
    """Every clip of `corpus` against its true caption and each of its wrong ones, one row for each caption.

    wrong(record, rng) -> {kind: caption}, as a world gives them (`worlds`). Columns: clip, kind ("true", or such as missing,
    replaced, swapped, count), truth (1 or 0), caption, then one score per reward, and `<reward>_yes_mass` where the reward gives
    `p_yes_mass` (the probability that yes and no hold together).
    """
    rng = np.random.default_rng([seed, 90])
    rows = []
    for clip, record in enumerate(corpus.records):
        captions = {TRUE: record["caption"], **wrong(record, rng)}
        rows += [{"clip": clip, "kind": kind, "truth": int(kind == TRUE), "caption": c} for kind, c in captions.items()]
    table = pd.DataFrame(rows)
    for name, reward in rewards.items():
        chunks = [table.iloc[start : start + CHUNK] for start in range(0, len(table), CHUNK)]
        results = [reward(corpus.waveforms(c["clip"].tolist()), corpus.sample_rate, list(c["caption"])) for c in chunks]
        table[name] = np.concatenate([result.scores.numpy() for result in results])
        if "p_yes_mass" in results[0].parts:
            table[f"{name}_yes_mass"] = np.concatenate([result.parts["p_yes_mass"].numpy() for result in results])
    return table


def auc(scores, truth) -> float:
    """Probability that a true one scores above a false one, a tie counting half; nan when one side is empty.

    scores (M,); truth (M,) of 0 and 1. The Mann-Whitney statistic over the number of pairs.
    """
    truth = np.asarray(truth) > 0
    yes, no = int(truth.sum()), int((~truth).sum())
    if not yes or not no:
        return float("nan")
    ranks = rankdata(np.asarray(scores, float))
    return float((ranks[truth].sum() - yes * (yes + 1) / 2) / (yes * no))


def balanced_accuracy(scores, truth, threshold: float) -> float:
    """Half the share of true ones above `threshold` plus half the share of false ones at or below it."""
    scores, truth = np.asarray(scores, float), np.asarray(truth) > 0
    if truth.all() or not truth.any():
        return float("nan")
    return float(0.5 * (scores[truth] > threshold).mean() + 0.5 * (scores[~truth] <= threshold).mean())


def best_threshold(scores, truth) -> float:
    """The observed score with the best balanced accuracy as a threshold; choose it on other data than it is used on."""
    candidates = np.unique(np.asarray(scores, float))
    return float(max(candidates, key=lambda value: balanced_accuracy(scores, truth, value)))


def accuracy_table(rows: pd.DataFrame, thresholds: Mapping[str, float]) -> pd.DataFrame:
    """Per reward and kind of hard negative: balanced_accuracy at the reward's threshold, auc, and the share of clips
    whose true caption scores above the false one (`pair_accuracy` over n pairs, low and high by resampling clips).

    rows from `score_captions`. A kind is scored on the clips that have it; "all kinds" pools them.
    """
    lines = []
    kinds = [kind for kind in sorted(rows["kind"].unique()) if kind != TRUE]
    for name, threshold in thresholds.items():
        right = rows[rows["kind"] == TRUE].set_index("clip")[name]
        for kind in [*kinds, ALL]:
            wrong = rows[rows["kind"] == kind] if kind != ALL else rows[rows["kind"] != TRUE]
            above = right.loc[wrong["clip"]].to_numpy() - wrong[name].to_numpy()
            won = int((above > 0).sum())
            both = rows[rows["clip"].isin(wrong["clip"]) & ((rows["kind"] == TRUE) | rows.index.isin(wrong.index))]
            _, low, high = stats.bootstrap_mean((above > 0).astype(float), wrong["clip"].to_numpy())
            lines.append(
                {
                    "reward": name,
                    "kind": kind,
                    "n": len(wrong),
                    "balanced_accuracy": balanced_accuracy(both[name], both["truth"], threshold),
                    "auc": auc(both[name], both["truth"]),
                    "pair_accuracy": won / len(wrong),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(lines)


def as_summary(table: pd.DataFrame, value: str = "pair_accuracy") -> pd.DataFrame:
    """`accuracy_table` with the columns that `plots.bars_with_intervals` draws: metric and mean instead of `value`."""
    return table.rename(columns={value: "mean"}).assign(metric=value)


def clip_quality(judged: Mapping[str, object]) -> np.ndarray:
    """One number in [0, 1] a clip from what the judge heard: the mean of its event F1 and its exact match.

    judged: `Judge.score`'s dict. F1 alone would not see order; exact match alone would not see half a success.
    """
    tp, fp, fn, exact = (np.asarray(judged[name], float) for name in ("tp", "fp", "fn", "exact"))
    total = 2 * tp + fp + fn
    return 0.5 * np.divide(2 * tp, total, out=np.zeros_like(tp), where=total > 0) + 0.5 * exact


def sibling_agreement(scores, quality, group_ids: Sequence[int]) -> tuple[float, int]:
    """Share of pairs within a group in which the reward prefers the clip of higher quality (a tied reward counts half),
    and how many pairs differ in quality. nan without such a pair. This is what group advantages learn from.
    """
    scores, quality, groups = (np.asarray(values, float) for values in (scores, quality, group_ids))
    won, total = 0.0, 0
    for group in np.unique(groups):
        for a, b in combinations(np.flatnonzero(groups == group), 2):
            if quality[a] == quality[b]:
                continue
            total += 1
            won += 0.5 * (1 + np.sign(scores[a] - scores[b]) * np.sign(quality[a] - quality[b]))
    return (won / total if total else float("nan")), total
