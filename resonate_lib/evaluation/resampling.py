"""What the bootstrap draws from and how: sums per prompt and seed, draws of both, ratios of sums.

A metric is a sum over clips divided by a sum over clips, so a (prompts, seeds) table of each sum is all that is needed.
Intervals, p values and comparisons are made of it in `stats.py`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

NAN = float("nan")


def finite(top, bottom) -> tuple[np.ndarray, np.ndarray]:
    """Both sums' terms (M,) with 0 where either is nan, so that a clip without a value counts in neither."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"shapes {top.shape} and {bottom.shape}: two arrays (M,) of one length are allowed")
    known = np.isfinite(top) & np.isfinite(bottom)
    return np.where(known, top, 0.0), np.where(known, bottom, 0.0)


def sum_tables(parts, groups, seeds) -> list[np.ndarray]:
    """The sums of each part (M,) in a (prompts, seeds) table; labels None: every value its own prompt, all of one seed."""
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


def paired_tables(top_a, bottom_a, top_b, bottom_b, groups, seeds) -> list[np.ndarray]:
    """Four tables over the same prompts and seeds; a pair with a nan on either side is left out. Raises ValueError where the two
    sides differ in length."""
    parts = (*finite(top_a, bottom_a), *finite(top_b, bottom_b))
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"paired values of lengths {[len(p) for p in parts]}: pass one value of each side per pair")
    known = np.isfinite([np.asarray(part, float) for part in (top_a, bottom_a, top_b, bottom_b)]).all(axis=0)
    return sum_tables([np.where(known, part, 0.0) for part in parts], groups, seeds)


def resampled(tables, *, n: int, seed: int) -> list[np.ndarray]:
    """The sum (n,) of each (prompts, seeds) table over the same n draws of prompts and seeds."""
    prompts, levels = _weights(*tables[0].shape, n, seed)
    return [((prompts @ table) * levels).sum(axis=1) for table in tables]


def prompt_scores(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Each prompt's part (P,) in a ratio of sums: their mean is the ratio, their deviation over sqrt(P) its standard error.

    Of a mean with equally many clips a prompt these are the prompts' means; else the ratio's linearisation (delta method).
    """
    total, tops, bottoms = bottom.sum(), top.sum(axis=1), bottom.sum(axis=1)
    if total == 0:
        return np.full(len(top), NAN)
    rate = top.sum() / total
    return rate + len(top) * (tops - rate * bottoms) / total


def rates_by_seed(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """The ratio (seeds,) of each seed by itself."""
    return divide(top.sum(axis=0), bottom.sum(axis=0))


def divide(top, bottom):
    """top / bottom with nan where bottom is 0."""
    top, bottom = np.asarray(top, float), np.asarray(bottom, float)
    return np.divide(top, bottom, out=np.full(top.shape, NAN), where=bottom != 0)


def _codes(labels, size: int, default: np.ndarray) -> np.ndarray:
    if labels is None:
        return default
    labels = np.asarray(labels)
    if len(labels) != size:
        raise ValueError(f"{len(labels)} labels for {size} values: pass one prompt id and one seed per value")
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


@lru_cache(maxsize=4)
def _weights(prompts: int, levels: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample draws each prompt (n, prompts) and seed (n, levels); kept, as all systems of a table share them."""
    rng = np.random.default_rng(seed)

    def draw(units: int) -> np.ndarray:
        if units <= 1:
            return np.ones((n, units))
        return rng.multinomial(units - 1, np.full(units, 1 / units), size=n).astype(float)

    drawn = draw(prompts), draw(levels)
    for weights in drawn:
        weights.setflags(write=False)
    return drawn
