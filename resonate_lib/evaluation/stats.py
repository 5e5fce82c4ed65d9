"""Intervals: bootstrap over prompts and seeds, paired differences, t over a few seeds, Wilson for a rate.

What is averaged is in `metrics.py`. Every function is deterministic in its seed and vectorised over the resamples.
The bootstrap is the percentile bootstrap (Efron 1979) on clusters; each level draws one unit fewer than it has, which
removes the downward bias of its variance (Hesterberg, arXiv 1411.5279). That matters for the two or three seeds of a
run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

NAN = float("nan")


class Interval(NamedTuple):
    """An estimate (a mean, a ratio or a difference) and the ends of its interval; nan where there is nothing to say."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return bool(self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values, groups=None, *, seeds=None, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of `values` (M,) with a bootstrap interval; nan values are left out.

    groups (M,): prompt ids; whole prompts are resampled (default: every value is its own prompt).
    seeds (M,): training seeds, resampled as a second level when there are two or more. A single prompt gives nan ends.
    """
    return bootstrap_ratio(
        values, np.ones(len(np.asarray(values))), groups, seeds=seeds, n=n, seed=seed, confidence=confidence
    )


def bootstrap_ratio(
    numerator, denominator, groups=None, *, seeds=None, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """sum(numerator) / sum(denominator), both (M,), with the same bootstrap: micro F1 is 2·tp over 2·tp + fp + fn."""
    top, bottom = _finite(numerator, denominator)
    tops, bottoms = _tables((top, bottom), groups, seeds)
    prompts, levels = _weights(*tops.shape, n=n, seed=seed)
    samples = _divide(_apply(prompts, levels, tops), _apply(prompts, levels, bottoms))
    return _interval(_divide(tops.sum(), bottoms.sum()), samples, tops.shape[0], confidence)


def paired_bootstrap(
    a, b, groups=None, seeds=None, *, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """mean(a) - mean(b) for paired values (M,) with a bootstrap interval; a pair with a nan is left out.

    groups, seeds: as in `bootstrap_mean`; both sides of a pair share their prompt, so its difficulty cancels.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    known = np.isfinite(a) & np.isfinite(b)
    ones = np.where(known, 1.0, NAN)
    return paired_ratio(a, ones, b, ones, groups, seeds, n=n, seed=seed, confidence=confidence)


def paired_ratio(
    top_a, bottom_a, top_b, bottom_b, groups=None, seeds=None, *, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Difference of two ratios of sums, a - b, over the same resampled prompts and seeds; all inputs (M,)."""
    parts = (*_finite(top_a, bottom_a), *_finite(top_b, bottom_b))
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"paired values of lengths {[len(p) for p in parts]}: pass one value of each side per pair")
    tables = _tables(parts, groups, seeds)
    prompts, levels = _weights(*tables[0].shape, n=n, seed=seed)
    sums = [_apply(prompts, levels, table) for table in tables]
    totals = [table.sum() for table in tables]
    point = _divide(totals[0], totals[1]) - _divide(totals[2], totals[3])
    samples = _divide(sums[0], sums[1]) - _divide(sums[2], sums[3])
    return _interval(point, samples, tables[0].shape[0], confidence)


def t_interval(values, *, confidence: float = 0.95) -> Interval:
    """Mean of a few values, one per seed, with Student's t interval; fewer than two give nan ends."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return Interval(NAN, NAN, NAN)
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, NAN, NAN)
    half = scipy_stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - float(half), mean + float(half))


def wilson(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """A rate with Wilson's score interval (1927), good for few trials and rates near 0 or 1; nan without trials."""
    if not 0 <= successes <= total:
        raise ValueError(f"successes={successes}, total={total}: allowed are 0 <= successes <= total; check the counts")
    if total == 0:
        return Interval(NAN, NAN, NAN)
    z = float(scipy_stats.norm.ppf((1 + confidence) / 2))
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # rounding would otherwise leave 1e-17 instead of the exact ends
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == total else float(centre + half)
    return Interval(rate, low, high)


def _finite(top, bottom) -> tuple[np.ndarray, np.ndarray]:
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"shapes {top.shape} and {bottom.shape}: two arrays (M,) of one length are allowed")
    known = np.isfinite(top) & np.isfinite(bottom)
    return np.where(known, top, 0.0), np.where(known, bottom, 0.0)


def _tables(parts, groups, seeds) -> list[np.ndarray]:
    """Sums of each part in a (prompts, seeds) table; the bootstrap needs nothing else."""
    size = len(parts[0])
    rows = _codes(groups, size, np.arange(size))
    columns = _codes(seeds, size, np.zeros(size, int))
    if size == 0:
        return [np.zeros((0, 1)) for _ in parts]
    shape = (rows.max() + 1, columns.max() + 1)
    tables = []
    for part in parts:
        table = np.zeros(shape)
        np.add.at(table, (rows, columns), part)
        tables.append(table)
    # a prompt without any value (order accuracy of a prompt that asks no order) is no unit of the population
    used = np.any([table.any(axis=1) for table in tables], axis=0)
    return [table[used] for table in tables]


def _codes(labels, size: int, default: np.ndarray) -> np.ndarray:
    if labels is None:
        return default
    labels = np.asarray(labels)
    if len(labels) != size:
        raise ValueError(f"{len(labels)} labels for {size} values: pass one prompt id and one seed per value")
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _weights(prompts: int, levels: int, *, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)

    def draw(units: int) -> np.ndarray:
        if units <= 1:
            return np.ones((n, units))
        return rng.multinomial(units - 1, np.full(units, 1 / units), size=n).astype(float)

    return draw(prompts), draw(levels)


def _apply(prompts: np.ndarray, levels: np.ndarray, table: np.ndarray) -> np.ndarray:
    return ((prompts @ table) * levels).sum(axis=1)


def _divide(top, bottom):
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(top, bottom, out=np.full(top.shape, NAN), where=bottom != 0)


def _interval(point, samples: np.ndarray, prompts: int, confidence: float) -> Interval:
    samples = samples[np.isfinite(samples)]
    if prompts < 2 or len(samples) == 0:
        return Interval(float(point), NAN, NAN)
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(point), float(low), float(high))
