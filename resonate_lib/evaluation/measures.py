"""Measures of rows that count with a weight, and their bootstrap over clips: AUC, balanced accuracy, rank correlation, Cohen's
kappa, calibration error. `stats.py` has the bootstrap of sums, which needs no weights; the tables are in `agreement.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.stats import rankdata

from resonate_lib.evaluation import stats
from resonate_lib.evaluation.stats import NAN

BINS = 10  # of a calibration curve
BLOCK = 250  # resamples worked out at a time
SHARES = ("balanced_accuracy", "auc", "auc_exact", "pair_accuracy", "share_yes")  # between 0 and 1, so Wilson's interval fits

Measure = Callable[[np.ndarray], np.ndarray]  # weights (R, M): how often each of M rows counts in each of R resamples -> (R,)


def over_clips(measures: Mapping[str, Measure], clips, *, n: int = 2000, seed: int = 0) -> dict[str, float]:
    """{name, name_low, name_high} of each measure of M rows: 95 % percentile bootstrap, whole clips (M,) drawn again.

    A measure takes weights (R, M), how often each row counts in each of R resamples, and gives R values. As in `stats` a
    resample has one clip fewer than there are. A single clip gives nan ends.
    """
    names, place = np.unique(np.asarray(clips), return_inverse=True)
    rng, draws = np.random.default_rng(seed), {name: [] for name in measures}
    for start in range(0, n if len(names) > 1 else 0, BLOCK):
        size = min(BLOCK, n - start)
        weights = rng.multinomial(len(names) - 1, np.full(len(names), 1 / len(names)), size=size)[:, place].astype(float)
        for name, measure in measures.items():
            draws[name].append(measure(weights))
    found = {}
    for name, measure in measures.items():
        values = np.concatenate(draws[name]) if draws[name] else np.array([])
        values = values[np.isfinite(values)]
        found[name] = float(measure(np.ones((1, len(place))))[0])
        low, high = np.quantile(values, [0.025, 0.975]) if len(values) else (NAN, NAN)
        if low == high == found[name] and name in SHARES and found[name] in (0.0, 1.0):
            _, low, high = stats.wilson(round(found[name] * len(names)), len(names))  # none or all: resampling knows no spread
        found[f"{name}_low"], found[f"{name}_high"] = low, high
    return found


def _ratio(top, bottom) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), NAN), where=np.asarray(bottom) > 1e-12)


def _below(values) -> Measure:
    """Of weights (R, M), for every row the weight of the rows with a smaller value, ties counting half: (R, M)."""
    values = np.asarray(values, float)
    order = np.argsort(values, kind="stable")
    left, right = (np.searchsorted(values[order], values, side) for side in ("left", "right"))

    def weigh(weights):
        total = np.pad(np.cumsum(weights[:, order], axis=1), ((0, 0), (1, 0)))
        return (total[:, left] + total[:, right]) / 2

    return weigh


def mean_of(values) -> Measure:
    """The mean of values (M,); nan ones are left out."""
    values = np.asarray(values, float)
    known = np.isfinite(values).astype(float)
    return lambda weights: _ratio(weights @ np.nan_to_num(values), weights @ known)


def auc_of(scores, truth) -> Measure:
    """Area under the ROC curve of scores (M,), truth (M,) above 0 being the positives; ties count half."""
    below, truth = _below(scores), (np.asarray(truth) > 0).astype(float)

    def measure(weights):
        yes, no = weights * truth, weights * (1 - truth)
        return _ratio((yes * below(no)).sum(1), yes.sum(1) * no.sum(1))

    return measure


def balanced_of(scores, truth, threshold: float) -> Measure:
    """Balanced accuracy: half the share of positives scored above the threshold, half that of negatives not above it."""
    said, truth = np.asarray(scores, float) > threshold, np.asarray(truth) > 0
    hit, miss = mean_of(np.where(truth, said, np.nan)), mean_of(np.where(truth, np.nan, ~said))
    return lambda weights: 0.5 * hit(weights) + 0.5 * miss(weights)


def spearman_of(a, b) -> Measure:
    """Spearman's rank correlation of a (M,) and b (M,); ties share their mean rank."""
    ranks = _below(a), _below(b)

    def measure(weights):
        total = weights.sum(1, keepdims=True)
        x, y = (rank(weights) for rank in ranks)
        x, y = (r - (weights * r).sum(1, keepdims=True) / total for r in (x, y))
        return _ratio((weights * x * y).sum(1), np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1)))

    return measure


def kappa_of(a, b) -> Measure:
    """Cohen's kappa of two judges' yes and no (M,) bool; nan where both say the same thing always."""
    a, b = np.asarray(a, float), np.asarray(b, float)

    def measure(weights):
        total = weights.sum(1)
        same, yes_a, yes_b = (weights @ part / total for part in ((a == b).astype(float), a, b))
        chance = yes_a * yes_b + (1 - yes_a) * (1 - yes_b)
        return _ratio(same - chance, 1 - chance)

    return measure


def bins_of(scores, count: int = BINS) -> np.ndarray:
    """The bin, 0 to count - 1, of each score (M,): bins of equal counts, equal scores in one bin."""
    return np.floor((rankdata(scores) - 0.5) / len(scores) * count).astype(int)


def ece_of(scores, truth, count: int = BINS) -> Measure:
    """Expected calibration error: over bins of equal counts, the mean of |mean score - share true| weighted by rows.

    scores (M,) in [0, 1], truth (M,) of 0 and 1; the bins stay those of all rows. Source: Naeini et al. 2015.
    """
    gap, member = np.asarray(scores, float) - np.asarray(truth, float), _members(scores, count)
    return lambda weights: _ratio(np.abs((weights * gap) @ member).sum(1), weights.sum(1))


def _members(scores, count: int) -> np.ndarray:
    return np.equal.outer(bins_of(scores, count), np.arange(count)).astype(float)


def ece_floor(scores, truth, count: int = BINS, *, n: int = 400, seed: int = 0) -> tuple[float, float]:
    """The low end of the calibration error's 95 % interval, and the error that 95 % of perfectly calibrated judges stay below.

    Small bins give even a calibrated judge an error, and a bootstrap adds to it: its own low end would never be 0. So the low end
    is the smallest error under which the one found is no surprise, when every score misses by the same share of its bin's gap.
    By simulation, n sets for each of 21 shares. With the bootstrap's high end it covers the error of 800 rows in 91 to 100 % of
    simulated sets (five judges, from calibrated to far too sure); the bootstrap alone never covers that of a calibrated one.
    """
    scores, truth = np.asarray(scores, float), np.asarray(truth, float)
    member = _members(scores, count)
    gap = member @ np.nan_to_num(_ratio((truth - scores) @ member, member.sum(0)))
    found, draws = once(ece_of(scores, truth, count), len(scores)), np.random.default_rng(seed).random((n, len(scores)))
    shares = np.linspace(0, 1, 21)
    errors = [np.abs(((draws < scores + share * gap) - scores) @ member).sum(1) / len(scores) for share in shares]
    low = next(share for share, error in zip(shares, errors, strict=True) if share == 1 or np.quantile(error, 0.975) >= found)
    return float(low * found), float(np.quantile(errors[0], 0.95))


def once(measure: Measure, count: int) -> float:
    """A measure of `count` rows, each counting once."""
    return float(measure(np.ones((1, count)))[0])
