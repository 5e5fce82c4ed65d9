"""Intervals against closed forms and simulations with known truth; metrics against counts by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from resonate_lib.evaluation import metrics, stats


def test_bootstrap_of_a_mean_is_the_normal_interval():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    half = 1.96 * values.std(ddof=1) / 20
    found = stats.bootstrap_mean(values, n=20000)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_deterministic_by_seed_and_blind_to_row_order():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=60), np.repeat([f"p{i:02}" for i in range(20)], 3)
    order = rng.permutation(60)
    assert stats.bootstrap_mean(values, groups) == stats.bootstrap_mean(values, groups)
    assert stats.bootstrap_mean(values, groups) != stats.bootstrap_mean(values, groups, seed=1)
    assert stats.bootstrap_mean(values, groups) == pytest.approx(stats.bootstrap_mean(values[order], groups[order]))


def test_repeating_a_prompt_adds_no_certainty():
    values = np.random.default_rng(2).normal(size=100)
    once = stats.bootstrap_mean(values, np.arange(100))
    four = stats.bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert four == pytest.approx(once)


@pytest.mark.parametrize("kind", ["mean", "paired", "ratio"])
def test_coverage_over_100_prompts(kind):
    """95 % intervals hold the truth in 93-97 % of 1,000 simulated sets of 100 prompts."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        skill = rng.beta(2, 2, size=100)  # each prompt has its own difficulty, shared by both systems
        a, b = (rng.random(100) < np.minimum(skill + 0.2, 1)).astype(float), (rng.random(100) < skill).astype(float)
        if kind == "mean":
            truth, found = 0.5, stats.bootstrap_mean(b, n=500)
        elif kind == "paired":
            # E[min(x + 0.2, 1)] - E[x] for Beta(2, 2): 0.2 F(0.8) + integral of (1 - x) over the last fifth
            truth, found = 0.2 * 0.896 + 0.0144, stats.paired_bootstrap(a, b, n=500)
        else:
            size = rng.integers(1, 5, size=100)
            found = stats.bootstrap_ratio(rng.binomial(size, 0.7), size, n=500)
            truth = 0.7
        held += found.low <= truth <= found.high
    assert 930 <= held <= 970, f"{held} of 1000"


def test_pairing_removes_the_difficulty_of_prompts():
    base = np.random.default_rng(4).normal(0, 10, size=50)
    found = stats.paired_bootstrap(base + 1.0, base, np.arange(50))
    assert found == pytest.approx((1.0, 1.0, 1.0)) and found.excludes_zero
    unpaired = stats.bootstrap_mean(base)
    assert unpaired.high - unpaired.low > 4


def test_seeds_are_a_second_level():
    prompts, seeds = np.tile(np.arange(200), 3), np.repeat([0, 1, 2], 200)
    gain = np.choose(seeds, [0.0, 0.1, 0.2])  # all the variance lies between seeds
    zero = np.zeros(600)
    assert stats.paired_bootstrap(gain, zero, prompts) == pytest.approx((0.1, 0.1, 0.1), abs=0.02)
    found = stats.paired_bootstrap(gain, zero, prompts, seeds)
    assert (found.low, found.high) == pytest.approx((0.0, 0.2), abs=1e-9)
    # two of three seeds drawn: the variance of a mean over three seeds, s²/3, is met without bias
    draws = [np.mean(d) for d in np.random.default_rng(0).choice([0.0, 0.1, 0.2], size=(100000, 2))]
    assert np.var(draws) == pytest.approx(np.var([0.0, 0.1, 0.2], ddof=1) / 3, rel=0.02)


def test_nothing_to_say_is_nan():
    assert all(map(math.isnan, stats.bootstrap_mean([])))
    assert all(map(math.isnan, stats.bootstrap_mean([np.nan, np.nan])))
    one = stats.bootstrap_mean([1.0, 1.0], ["p", "p"])
    assert one.mean == 1.0 and math.isnan(one.low) and not one.excludes_zero
    assert stats.bootstrap_mean([1.0, np.nan, 0.0]).mean == 0.5
    with pytest.raises(ValueError, match="labels for"):
        stats.bootstrap_mean([1.0, 2.0], ["p"])
    with pytest.raises(ValueError, match="of one length"):
        stats.paired_bootstrap([1.0, 2.0], [1.0])


def test_t_interval_by_hand_and_its_coverage():
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.30265
    half = 4.30265 / math.sqrt(3)
    assert stats.t_interval([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)
    assert math.isnan(stats.t_interval([1.0]).low) and math.isnan(stats.t_interval([]).mean)
    draws = np.random.default_rng(0).normal(size=(2000, 3))
    held = sum(i.low <= 0 <= i.high for i in map(stats.t_interval, draws))
    assert 0.93 <= held / 2000 <= 0.97


def test_answers_that_share_prompts_and_listeners_count_less():
    won = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    prompts, listeners = np.repeat(list("abcde"), 4), np.tile([0, 1, 2, 3], 5)
    means, rate, total = won.reshape(5, 4).mean(axis=1), won.mean(), len(won)
    variance, own = means.var(ddof=1) / 5, rate * (1 - rate) / (total - 1)  # equal prompts: the variance of a mean of means
    wide = stats.clustered_rate(won, prompts)
    z = scipy.stats.t.ppf(0.975, variance**2 / ((variance - own) ** 2 / 4))
    for end in (wide.low, wide.high):  # Wilson's ends are where the rate lies z deviations off
        assert abs(rate - end) / math.sqrt(end * (1 - end) * variance / own / total) == pytest.approx(z)
    plain = stats.wilson(won.sum(), total)
    assert wide.mean == plain.mean and wide.low < plain.low and wide.high > plain.high
    assert stats.clustered_rate(won, listeners, prompts) == stats.clustered_rate(won, prompts, listeners)
    assert stats.clustered_rate(won, np.arange(total), np.zeros(total)) == stats.clustered_rate(won) == plain
    assert stats.clustered_rate(np.ones(8), [0] * 4 + [1] * 4) == stats.wilson(8, 8)
    assert math.isnan(stats.clustered_rate([], []).mean)


def test_wilson_known_values():
    assert stats.wilson(8, 10)[1:] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert stats.wilson(0, 10)[1:] == pytest.approx((0, 0.2775), abs=1e-4)
    assert stats.wilson(10, 10).high == 1.0 and math.isnan(stats.wilson(0, 0).mean)
    with pytest.raises(ValueError, match="0 <= successes <= total"):
        stats.wilson(3, 2)


def test_a_share_of_all_or_none_keeps_an_interval():
    rng = np.random.default_rng(11)
    found = [stats.bootstrap_mean((rng.random(100) < 0.99).astype(float), n=500) for _ in range(500)]
    assert np.mean([i.mean == 1 for i in found]) > 0.3  # 0.99^100 is 0.37: a bootstrap of these would miss the truth each time
    assert np.mean([i.low <= 0.99 <= i.high for i in found]) > 0.9
    assert stats.bootstrap_mean(np.zeros(20))[:2] == (0, 0) and stats.bootstrap_mean(np.zeros(20)).high > 0.1
    assert stats.bootstrap_mean([0.5, 0.5]) == (0.5, 0.5, 0.5)  # a score, not a share


def test_metrics_by_hand():
    # 3 right, 1 invented, 2 missed: 6 / 9
    assert metrics.event_f1([2, 1], [0, 1], [1, 1]) == pytest.approx(6 / 9)
    assert math.isnan(metrics.event_f1([0], [0], [0]))


def rows():
    table = pd.DataFrame(
        {"id": ["a", "b", "c", "d"], "seed": 0, "kind": ["single", "single", "while", "while"], "exact": [1.0, 0, 1, 1]}
    )
    table["order"] = np.nan
    for name, values in {"tp": [1, 0, 2, 2], "fp": [0, 1, 0, 0], "fn": [0, 1, 0, 0]}.items():
        table[name], table[f"{name}_real"] = values, 0
    return table


def test_summarise_has_fixed_columns_and_counts():
    names = ("exact", "event_f1", "event_f1_real", "event_f1_procedural", "order")
    table = metrics.summarise(rows(), ["kind"], metrics=names)
    assert list(table.columns) == ["kind", *metrics.SUMMARY_COLUMNS]
    found = table.set_index(["kind", "metric"])
    assert found.loc[("single", "exact"), "mean"] == 0.5
    assert found.loc[("single", "event_f1"), "mean"] == found.loc[("single", "event_f1_procedural"), "mean"] == 0.5
    all_right = found.loc[("while", "event_f1"), ["mean", "low", "high", "n", "seeds"]].tolist()
    assert all_right == pytest.approx([1, 2 / (2 + 1.959964**2), 1, 2, 1])  # Wilson: two prompts, both right
    assert math.isnan(found.loc[("while", "event_f1_real"), "mean"])
    assert found.loc[("while", "order"), "n"] == 0 and math.isnan(found.loc[("while", "order"), "mean"])
    assert list(metrics.summarise(rows(), metrics=("exact",)).columns) == list(metrics.SUMMARY_COLUMNS)
    with pytest.raises(ValueError, match="no column 'nope'"):
        metrics.summarise(rows(), metrics=("nope",))


def test_sanity_of_clips():
    clips = torch.stack([torch.zeros(8000), torch.full((8000,), 1.0), 0.1 * torch.sin(torch.arange(8000) * 0.4)])
    found = metrics.sanity(clips, 16000)
    assert found["silent"].tolist() == [True, False, False] and found["clipping"].tolist() == [False, True, False]
    assert found["peak_dbfs"][2] == pytest.approx(-20, abs=0.1)
    assert np.isnan(found["loudness"][0]) and np.isfinite(found["loudness"][2])
    assert np.isnan(metrics.sanity(clips[:, :100], 16000)["loudness"]).all()


def test_compare_by_hand():
    # prompts p, q, r in two seeds; differences of the prompts' means: 1, 0.5, 0
    a, b = [1.0, 1, 1, 0, 1, 1], [0.0, 0, 0, 0, 1, 1]
    groups, seeds, ones = ["p", "p", "q", "q", "r", "r"], [0, 1] * 3, np.ones(6)
    found = stats.compare(a, ones, b, ones, groups, seeds)
    assert found.gain.mean == 0.5 and found.deviation == pytest.approx(0.5) and found.effect == pytest.approx(1)
    assert found.t == pytest.approx(stats.t_interval([2 / 3, 1 / 3])) and (found.prompts, found.seeds) == (3, 2)
    assert found.gain == stats.paired_ratio(a, ones, b, ones, groups, seeds)
    alone = stats.compare(a, ones, b, ones, groups)
    assert math.isnan(alone.t.mean) and alone.seeds == 1
    same = stats.compare(b, ones, b, ones, groups, seeds)
    assert same.p == 1 and same.effect == 0 and same.t == (0, 0, 0)
    far = stats.wilson(0, 3).high  # a share: three prompts without a difference do not rule one out
    assert same.gain == (0, -far, far)
    score = np.linspace(0, 1, 6)
    assert stats.compare(score, ones, score, ones).gain == (0, 0, 0)  # a score, not a share
    nothing = stats.compare([], [], [], [])
    assert math.isnan(nothing.p) and math.isnan(nothing.effect) and nothing.prompts == 0


def test_a_rare_difference_is_not_ruled_out_by_pairs_that_agree():
    rng, ones, held, alike = np.random.default_rng(3), np.ones(100), 0, 0
    for _ in range(300):
        b = (rng.random(100) < 0.5).astype(float)
        a = np.where(rng.random(100) < 0.02, 1.0, b)  # better in one of fifty where b is wrong: a gain of 0.01
        gain = stats.compare(a, ones, b, ones, n=500).gain
        held, alike = held + (gain.low <= 0.01 <= gain.high), alike + (gain.mean == 0)
    assert alike > 80 and held > 270  # without a spread to draw from 0.6 of them would hold it


def test_more_comparisons_get_more_resamples():
    assert stats.resamples(2000, 10) == 2000 and stats.resamples(2000, 100) == 4100
    ones = np.ones(30)
    p = stats.compare(ones, ones, 0 * ones, ones, n=stats.resamples(100, 54)).p
    assert stats.holm([p] * 54).max() < 0.05


def test_p_value_is_that_of_the_normal_test():
    rng = np.random.default_rng(5)
    a, ones = rng.normal(0.12, 1, size=400), np.ones(400)
    z = a.mean() / (a.std(ddof=1) / 20)
    found = stats.compare(a, ones, 0 * a, ones, n=20000)
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.005)
    assert (found.p < 0.05) == found.gain.excludes_zero
    assert stats.compare(a + 9, ones, 0 * a, ones, n=999).p == pytest.approx(2 / 1000)


def test_p_value_is_uniform_without_a_difference():
    rng, ones = np.random.default_rng(6), np.ones(100)
    p = [stats.compare(rng.normal(size=100), ones, 0 * ones, ones, n=1000).p for _ in range(1000)]
    assert 0.03 <= np.mean(np.less(p, 0.05)) <= 0.07 and 0.45 <= np.mean(p) <= 0.55


def test_deviation_of_a_ratio_is_its_standard_error():
    # of F1 over 400 prompts: the linearised deviation over sqrt(400) is the bootstrap's standard error
    rng = np.random.default_rng(7)
    asked = rng.integers(1, 4, size=400)
    tops = [2.0 * rng.binomial(asked, rate) for rate in (0.8, 0.6)]
    found = stats.compare(tops[0], tops[0] / 2 + asked, tops[1], tops[1] / 2 + asked, n=20000)
    assert (found.gain.high - found.gain.low) / (2 * 1.96) == pytest.approx(found.deviation / 20, rel=0.03)
    assert found.effect == pytest.approx(found.gain.mean / found.deviation)


def test_sides_apart_are_wider_than_pairs():
    rng, ones = np.random.default_rng(8), np.ones(300)
    hard = rng.normal(size=300)
    a, b = hard + 0.1 + rng.normal(0, 0.2, 300), hard + rng.normal(0, 0.2, 300)
    pairs, apart = stats.compare(a, ones, b, ones), stats.compare_apart((a, ones, None, None), (b, ones, None, None))
    assert pairs.gain.mean == pytest.approx(apart.gain.mean) and pairs.p < 0.01 < apart.p
    error = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 300)
    assert apart.gain.high - apart.gain.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert apart.effect == pytest.approx((a.mean() - b.mean()) / math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))
    # Welch by hand: seeds' means 1, 3 and 0, 2, 4 have variances 2 and 4; error² = 1 + 4/3, freedom 5.44 / (1 + 8/9)
    sides = ([1.0, 3], np.ones(2), ["p", "p"], [0, 1]), ([0.0, 2, 4], np.ones(3), ["p"] * 3, [0, 1, 2])
    t = stats.compare_apart(*sides).t
    freedom = (7 / 3) ** 2 / (1 + (4 / 3) ** 2 / 2)
    assert t.mean == 0 and t.high == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * math.sqrt(7 / 3))
    assert math.isnan(apart.t.low) and math.isnan(stats.compare_apart(*sides).gain.low)  # one prompt says nothing


def test_holm_known_values():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.01, math.nan, 0.02, 0.9]) == pytest.approx([0.03, math.nan, 0.04, 0.9], nan_ok=True)
    assert stats.holm([0.6, 0.7]).tolist() == [1, 1] and stats.holm([]).tolist() == []


def test_power_known_values():
    # (1.95996 + 0.84162)² · (1 / 0.5)² = 31.4;  Cohen's d of 0.2: 196.2
    assert stats.prompts_needed(1.0, 0.5) == 32 and stats.prompts_needed(0.4, -0.08) == 197
    assert stats.prompts_needed(1.0, 0.5, power=0.9) == 43  # (1.95996 + 1.28155)² · 4 = 42.03
    assert stats.detectable(1.0, 100) == pytest.approx(0.280158, abs=1e-5)
    assert stats.prompts_needed(0.4, stats.detectable(0.4, 250) + 1e-9) == 250
    rng, ones = np.random.default_rng(10), np.ones(100)
    shown = [stats.compare(rng.normal(0.280158, 1, 100), ones, 0 * ones, ones, n=500).p < 0.05 for _ in range(500)]
    assert 0.74 <= np.mean(shown) <= 0.86
    for bad in ((0.0, 0.1), (0.4, 0.0), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="above 0"):
            stats.prompts_needed(*bad)
    with pytest.raises(ValueError, match="use 2 or more"):
        stats.detectable(0.4, 1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.detectable(0.4, 10, power=1.0)
