"""Intervals: bootstrap over prompts and seeds, paired comparisons, t over a few seeds, Wilson for a rate; Holm, power.

What is averaged is in `metrics.py`, how it is drawn again in `resampling.py`. Every function is deterministic in its seed. The
bootstrap is the percentile bootstrap (Efron 1979) on clusters; each level draws one unit fewer than it has, which removes
the downward bias of its variance (Hesterberg, arXiv 1411.5279).

Coverage of 95 % intervals, measured by `python -m pytest -m slow -s tests/test_coverage.py`. Over prompts (1,000 simulated sets
each of 100 and of 300 prompts): mean 0.941 and 0.952, paired difference 0.952 and 0.936, F1 0.941 and 0.955. Over seeds of
training (4,000 sets; 100 prompts; the spread of the gain comes from prompts, from both alike, or from seeds):

    spread from        prompts   both    seeds
    3 seeds  bootstrap   0.957  0.933   0.783
             t           0.643  0.912   0.948
             either      0.958  0.959   0.949
    5 seeds  bootstrap   0.955  0.945   0.870
             t           0.442  0.886   0.943
             either      0.955  0.950   0.943

So the bootstrap over prompts and seeds is too narrow where three or five seeds of training differ much, and Student's t over the
seeds (which know nothing of other prompts) where prompts do. Tables show both; a claim needs both clear of 0 (`report.Claim`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats

from resonate_lib.evaluation.resampling import divide, finite, paired_tables, prompt_scores, rates_by_seed, resampled, sum_tables

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

    def columns(self, name: str) -> dict[str, float]:
        """The three numbers as a table has them: name, name_low, name_high."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Comparison(NamedTuple):
    """System a against system b on one metric: everything a table or a claim needs.

    gain: a - b with its bootstrap interval over prompts and seeds. p: two-sided, from the same resamples, so below 0.05 where
    the 95 % interval leaves 0 out. effect: gain / deviation. t: Student's interval over the seeds' gains, nan with one seed.
    deviation: of the prompts' differences, each the mean over its samples and seeds.
    """

    gain: Interval
    p: float
    effect: float
    t: Interval
    prompts: int
    seeds: int
    deviation: float


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
    """sum(numerator) / sum(denominator), both (M,), with the same bootstrap: micro F1 is 2·tp over 2·tp + fp + fn.

    A ratio of exactly 0 or 1 in every prompt has no spread to draw from: its interval is Wilson's over the prompts, as of a share.
    """
    top, bottom = finite(numerator, denominator)
    tops, bottoms = sum_tables((top, bottom), groups, seeds)
    if len(tops) > 1 and ((tops == 0).all() or (tops == bottoms).all()):
        return wilson(len(tops) if tops.any() else 0, len(tops), confidence=confidence)
    samples = divide(*resampled((tops, bottoms), n=n, seed=seed))
    return _interval(divide(tops.sum(), bottoms.sum()), samples, tops.shape[0], confidence)


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
    return compare(top_a, bottom_a, top_b, bottom_b, groups, seeds, n=n, seed=seed, confidence=confidence).gain


def compare(
    top_a, bottom_a, top_b, bottom_b, groups=None, seeds=None, *, n: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Comparison:
    """Two ratios of sums over the same prompts and noise, a - b; all inputs (M,), a mean has ones below.

    groups, seeds: as in `bootstrap_mean`; both sides of a pair share their prompt, so its difficulty cancels. p is never below
    2 / (n + 1), so with m comparisons n must be above 40 m for any of them to pass `holm` at 0.05: `resamples`. Where both are
    shares and no prompt tells them apart there is no spread to draw from, but a pair that differs may only not have come by: the
    interval reaches as far as Wilson's does for none of so many prompts. (With a gain of 0.01 and 100 prompts that is one set in
    three, and without it 0.61 of the intervals held the truth.)
    """
    tables = paired_tables(top_a, bottom_a, top_b, bottom_b, groups, seeds)
    sums = resampled(tables, n=n, seed=seed)
    prompts = tables[0].shape[0]
    point = divide(tables[0].sum(), tables[1].sum()) - divide(tables[2].sum(), tables[3].sum())
    samples = divide(sums[0], sums[1]) - divide(sums[2], sums[3])
    scores = prompt_scores(*tables[:2]) - prompt_scores(*tables[2:])
    by_seed = rates_by_seed(*tables[:2]) - rates_by_seed(*tables[2:])
    deviation = _deviation(scores)
    gain = _interval(point, samples, prompts, confidence)
    if prompts > 1 and point == 0 and all(np.array_equal(*pair) for pair in (tables[::2], tables[1::2])) and _is_share(tables):
        far = wilson(0, prompts, confidence=confidence).high
        gain = Interval(0.0, -far, far)
    return Comparison(
        gain=gain,
        p=_p_value(samples, prompts),
        effect=_effect(float(point), deviation),
        t=t_interval(by_seed, confidence=confidence) if np.isfinite(by_seed).sum() > 1 else Interval(NAN, NAN, NAN),
        prompts=prompts,
        seeds=int(np.isfinite(by_seed).sum()),
        deviation=deviation,
    )


def compare_apart(a: tuple, b: tuple, *, n: int = 2000, seed: int = 0, confidence: float = 0.95) -> Comparison:
    """Two ratios of sums over different prompts, seeds or noise, a - b: each side is resampled by itself.

    a, b: (top, bottom, groups, seeds), each (M,) or None for the last two. effect divides by the root of the mean of both
    variances (Cohen's d over prompts), t is Welch's interval over the seeds, nan where a side has one; prompts
    are the smaller side's, seeds the larger's.
    """
    sides = [sum_tables(finite(top, bottom), groups, seeds) for top, bottom, groups, seeds in (a, b)]
    points = [divide(top.sum(), bottom.sum()) for top, bottom in sides]
    # the second side draws from a seed of its own: equal draws would pair what is no pair
    rates = [divide(*resampled(side, n=n, seed=seed + i)) for i, side in enumerate(sides)]
    deviations = [_deviation(prompt_scores(*side)) for side in sides]
    by_seed = [rates_by_seed(*side) for side in sides]
    prompts, gain = min(side[0].shape[0] for side in sides), float(points[0] - points[1])
    both = math.hypot(*deviations)
    return Comparison(
        gain=_interval(gain, rates[0] - rates[1], prompts, confidence),
        p=_p_value(rates[0] - rates[1], prompts),
        effect=_effect(gain, both / math.sqrt(2)),
        t=_welch(*by_seed, confidence=confidence),
        prompts=prompts,
        seeds=max(int(np.isfinite(each).sum()) for each in by_seed),
        deviation=both,
    )


def resamples(n: int, comparisons: int) -> int:
    """n, or as many as it takes for one of so many comparisons to pass `holm` at 0.05."""
    return max(n, 41 * comparisons)


def holm(p_values) -> np.ndarray:
    """p values (M,) corrected for being M comparisons, in the order given: step-down (Holm 1979); nan passes and does not count."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(p_values.shape, NAN)
    known = np.flatnonzero(np.isfinite(p_values))
    order = known[np.argsort(p_values[known], kind="stable")]
    corrected[order] = np.minimum(np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order]), 1.0)
    return corrected


def prompts_needed(deviation: float, difference: float, *, power: float = 0.8, confidence: float = 0.95) -> int:
    """How many prompts show a paired difference: ((z(1 - alpha/2) + z(power)) · deviation / difference)², rounded up.

    deviation: of the prompts' differences (`Comparison.deviation`), above 0. Normal approximation: it holds from about 30
    prompts on. Raises ValueError for what no number of prompts can show.
    """
    if not deviation > 0 or not math.isfinite(deviation) or not abs(difference) > 0:
        raise ValueError(f"deviation={deviation}, difference={difference}: use a deviation above 0 and a difference other than 0")
    return max(2, math.ceil((_quantiles(power, confidence) * deviation / difference) ** 2))


def detectable(deviation: float, prompts: int, *, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest paired difference that so many prompts show; the inverse of `prompts_needed`."""
    if prompts < 2:
        raise ValueError(f"prompts={prompts}: use 2 or more")
    return _quantiles(power, confidence) * deviation / math.sqrt(prompts)


def _quantiles(power: float, confidence: float) -> float:
    if not 0 < power < 1 or not 0 < confidence < 1:
        raise ValueError(f"power={power}, confidence={confidence}: both must lie between 0 and 1")
    return float(scipy_stats.norm.ppf((1 + confidence) / 2) + scipy_stats.norm.ppf(power))


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
    return _score_interval(successes / total, total, float(scipy_stats.norm.ppf((1 + confidence) / 2)))


def clustered_rate(successes, *labels, confidence: float = 0.95) -> Interval:
    """A rate of answers (M,), each 0 or 1, that share units of one or more kinds, such as prompts and listeners.

    labels: of each kind the unit (M,) of every answer. What the sums of a kind's units vary more than those of independent answers
    adds to the rate's variance (two-way clustering, Cameron, Gelbach & Miller 2011, with one answer a cell). Wilson's interval is
    taken at the number of independent answers with that variance, with Student's quantile at Satterthwaite's degrees of freedom
    (1946). So it is `wilson` or wider, and exactly `wilson` where no unit has two answers or all answers are alike.
    """
    successes = np.asarray(successes, float)
    total, won = len(successes), int(successes.sum())
    if won in (0, total):
        return wilson(won, total, confidence=confidence)
    rate = won / total
    own, excess, pieces = rate * (1 - rate) / (total - 1), 0.0, 0.0
    for kind in labels:
        units = np.unique(np.asarray(kind), return_inverse=True)[1]
        shares = np.bincount(units) / total
        if 1 < len(shares) < total:
            between = np.sum((np.bincount(units, successes - rate) / total) ** 2) / (1 - np.sum(shares**2))
            more = max(0.0, between - own)
            excess, pieces = excess + more, pieces + more**2 / (len(shares) - 1)
    if excess == 0:
        return wilson(won, total, confidence=confidence)
    z = float(scipy_stats.t.ppf((1 + confidence) / 2, (own + excess) ** 2 / pieces))
    return _score_interval(rate, total * own / (own + excess), z)


def _score_interval(rate: float, total: float, z: float) -> Interval:
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * np.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # rounding would otherwise leave 1e-17 instead of the exact ends
    return Interval(rate, 0.0 if rate == 0 else float(centre - half), 1.0 if rate == 1 else float(centre + half))


def _is_share(tables: list[np.ndarray]) -> bool:
    """Whether the sums are counts out of counts: whole numbers, none above what it is divided by."""
    tops, bottoms = tables[::2], tables[1::2]
    whole = all((table == table.round()).all() and (table >= 0).all() for table in tables)
    return whole and all((top <= bottom).all() for top, bottom in zip(tops, bottoms, strict=True))


def _deviation(scores: np.ndarray) -> float:
    return float(scores.std(ddof=1)) if len(scores) > 1 else NAN


def _effect(gain: float, deviation: float) -> float:
    if gain == 0 and deviation >= 0:
        return 0.0
    # equal differences deviate by rounding alone, and have no standardised size
    return gain / deviation if deviation > 1e-9 * abs(gain) else NAN


def _p_value(samples: np.ndarray, prompts: int) -> float:
    """Two-sided: twice the smaller share of resamples on one side of 0, which inverts the percentile interval.

    One is added to counts and total (Davison & Hinkley 1997, 4.2.5), so that no p is 0.
    """
    samples = samples[np.isfinite(samples)]
    if prompts < 2 or len(samples) == 0:
        return NAN
    side = min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(samples) + 1))


def _welch(a: np.ndarray, b: np.ndarray, *, confidence: float) -> Interval:
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(len(a), len(b)) < 2:
        return Interval(NAN, NAN, NAN)
    mean, errors = float(a.mean() - b.mean()), [x.var(ddof=1) / len(x) for x in (a, b)]
    if sum(errors) == 0:
        return Interval(mean, mean, mean)
    freedom = sum(errors) ** 2 / sum(e * e / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True))
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(sum(errors)))
    return Interval(mean, mean - half, mean + half)


def _interval(point, samples: np.ndarray, prompts: int, confidence: float) -> Interval:
    samples = samples[np.isfinite(samples)]
    if prompts < 2 or len(samples) == 0:
        return Interval(float(point), NAN, NAN)
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(point), float(low), float(high))
