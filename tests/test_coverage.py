"""How often 95 % intervals hold the truth in simulated benchmarks: over prompts, and over few training seeds.

`python -m pytest -m slow -s tests/test_coverage.py` prints the figures that `stats` states.
"""

import numpy as np
import pytest

from resonate_lib.evaluation import stats

LEVELS = {"prompts": (1.0, 0.05), "both": (1.0, 1.0), "seeds": (0.05, 4.0)}  # which level the spread of the mean comes from


def bernoulli_sets(rng, sets, prompts):
    """Two systems on prompts of mixed difficulty: answers (sets, prompts) and the true rate of b and true difference a - b."""
    skill = rng.beta(2, 2, size=(sets, prompts))
    a, b = (rng.random(skill.shape) < np.minimum(skill + 0.2, 1)), rng.random(skill.shape) < skill
    # E[min(x + 0.2, 1)] - E[x] for Beta(2, 2): 0.2 F(0.8) + integral of (1 - x) over the last fifth
    return a.astype(float), b.astype(float), 0.5, 0.2 * 0.896 + 0.0144


def f1_sets(rng, sets, prompts):
    """Counts of one to three asked events, found at a rate of the prompt's own: numerators, denominators, and the true F1."""
    asked, skill = rng.integers(1, 4, size=(sets, prompts)), rng.beta(4, 2, size=(sets, prompts))
    found, wrong = rng.binomial(asked, skill), rng.poisson(0.4, size=(sets, prompts))
    # micro F1 is 2 E[tp] / (E[tp] + E[fp] + E[asked]) with E[tp] = 2 · 4/6
    truth = 2 * (4 / 3) / (4 / 3 + 0.4 + 2)
    return 2.0 * found, found + wrong + asked.astype(float), truth


def over_prompts(sets, prompts, n, seed=0):
    """The share of simulated sets whose interval holds the truth: of a mean, of a paired difference, of F1."""
    rng = np.random.default_rng([seed, prompts])  # not the stream that the resamples are drawn from
    a, b, rate, gain = bernoulli_sets(rng, sets, prompts)
    top, bottom, f1 = f1_sets(rng, sets, prompts)
    found = {
        "mean": [(rate, stats.bootstrap_mean(b[i], n=n)) for i in range(sets)],
        "difference": [(gain, stats.paired_bootstrap(a[i], b[i], n=n)) for i in range(sets)],
        "f1": [(f1, stats.bootstrap_ratio(top[i], bottom[i], n=n)) for i in range(sets)],
    }
    return {kind: np.mean([i.low <= truth <= i.high for truth, i in pairs]) for kind, pairs in found.items()}


def over_seeds(sets, prompts, seeds, level, n, seed=0):
    """The same for the gain of a trained system: bootstrap, t over the seeds, and the two together (either holds it).

    The gain of a prompt in a seed is its mean (0) plus a normal effect of the prompt, one of the seed, and one of both; the first
    two deviate so that the mean's spread comes from `level`.
    """
    rng = np.random.default_rng([seed, prompts, seeds])
    prompt_share, seed_share = LEVELS[level]
    ids, columns, ones = np.repeat(np.arange(prompts), seeds), np.tile(np.arange(seeds), prompts), np.ones(prompts * seeds)
    held = {"bootstrap": 0, "t": 0, "either": 0}
    for _ in range(sets):
        gain = rng.normal(0, prompt_share, size=(prompts, 1)) + rng.normal(0, seed_share * np.sqrt(seeds / prompts), size=seeds)
        gain = (gain + rng.normal(0, 0.5, size=(prompts, seeds))).ravel()
        found = stats.compare(gain, ones, 0 * ones, ones, ids, columns, n=n)
        inside = [interval.low <= 0 <= interval.high for interval in (found.gain, found.t)]
        for name, value in zip(held, (*inside, any(inside)), strict=True):
            held[name] += value
    return {name: value / sets for name, value in held.items()}


def test_coverage_over_prompts_in_small():
    for kind, share in over_prompts(300, 100, 1000).items():
        assert 0.915 <= share <= 0.985, (kind, share)  # 300 sets: three standard errors are 3.8 points


def test_coverage_over_three_seeds_in_small():
    shares = over_seeds(300, 100, 3, "seeds", 500)
    assert shares["bootstrap"] < 0.85 and 0.91 <= shares["t"] <= 0.985 and shares["either"] >= shares["t"]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [100, 300])
def test_coverage_over_prompts(prompts):
    """93-97 % of 1,000 simulated sets."""
    for kind, share in over_prompts(1000, prompts, 2000, seed=1).items():
        print(f"{prompts} prompts, {kind}: {share:.3f}")
        assert 0.93 <= share <= 0.97, (kind, share)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_over_seeds(seeds, level):
    """What `stats` says of few seeds: the bootstrap alone is too narrow where training varies, t where prompts do."""
    shares = over_seeds(4000, 100, seeds, level, 1000)
    print(f"{seeds} seeds, spread from {level}:", ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    assert shares["either"] >= 0.93  # 4,000 sets: the standard error is 0.35 points
    if level == "seeds":
        assert 0.93 <= shares["t"] <= 0.97 and shares["bootstrap"] < 0.93
    if level == "prompts":
        assert shares["bootstrap"] >= 0.93
