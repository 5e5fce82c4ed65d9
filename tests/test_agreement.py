"""Agreement of rewards with the truth and with each other: by brute force on small numbers, with planted judges whose every
number is known, and on scenes with a reward that knows them."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm, spearmanr

from resonate_lib import plots
from resonate_lib.data import scenes
from resonate_lib.data.corpus import Corpus
from resonate_lib.evaluation import agreement, measures
from resonate_lib.evaluation.worlds import open_world
from resonate_lib.rewards import RewardResult

rng = np.random.default_rng(0)


def pairs_in_order(scores, truth):
    pairs = itertools.product(scores[truth == 1], scores[truth == 0])
    return np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])


def rows_of(truth, **scores):
    """Rows as `score_captions` gives them, clip i with its true caption in row 2i and a wrong one in row 2i + 1."""
    truth = np.asarray(truth)
    kinds = np.where(truth > 0, agreement.TRUE, "replaced")
    return pd.DataFrame({"clip": np.arange(len(truth)) // 2, "kind": kinds, "truth": truth, "caption": "a dog", **scores})


# ---- single numbers ------------------------------------------------------


def test_auc_is_the_share_of_ordered_pairs():
    scores, truth = rng.integers(0, 6, 40), rng.integers(0, 2, 40)  # few values: many ties
    assert agreement.auc(scores, truth) == pytest.approx(pairs_in_order(scores, truth))
    assert np.isnan(agreement.auc([0.1, 0.2], [1, 1]))


def test_balanced_accuracy_and_threshold():
    scores, truth = [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]
    assert agreement.best_threshold(scores, truth) == 0.5  # midway, so that a new false one a little higher is still a no
    assert agreement.balanced_accuracy(scores, truth, 0.2) == 1.0
    assert agreement.balanced_accuracy(scores, truth, 0.15) == 0.75


def test_kappa_by_hand():
    # 5 answers, 4 alike; shares of yes 3/5 and 2/5: by chance 0.48 alike
    assert agreement.kappa([1, 1, 0, 0, 1], [1, 0, 0, 0, 1]) == pytest.approx((0.8 - 0.48) / 0.52)
    assert agreement.kappa([1, 0, 1, 0], [0, 1, 0, 1]) == pytest.approx(-1)
    assert np.isnan(agreement.kappa([1, 1, 1], [1, 1, 1]))  # nothing can be said of two judges that never say no


def test_a_weight_is_a_row_that_stands_several_times():
    a, b, truth = rng.integers(0, 8, 60).astype(float), rng.normal(size=60).round(1), rng.integers(0, 2, 60)
    weights = rng.integers(0, 4, (5, 60))
    found = {
        "auc": measures.auc_of(a, truth),
        "spearman": measures.spearman_of(a, b),
        "balanced": measures.balanced_of(b, truth, 0.1),
        "kappa": measures.kappa_of(a > 3, b > 0),
        "mean": measures.mean_of(np.where(truth, b, np.nan)),
    }
    found = {name: measure(weights.astype(float)) for name, measure in found.items()}
    for place, weight in enumerate(weights):
        x, y, t = (np.repeat(values, weight) for values in (a, b, truth))
        both, yes_x, yes_y = ((x > 3) == (y > 0)).mean(), (x > 3).mean(), (y > 0).mean()
        chance = yes_x * yes_y + (1 - yes_x) * (1 - yes_y)
        expected = {
            "auc": pairs_in_order(x, t),
            "spearman": spearmanr(x, y).statistic,
            "balanced": 0.5 * (y[t == 1] > 0.1).mean() + 0.5 * (y[t == 0] <= 0.1).mean(),
            "kappa": (both - chance) / (1 - chance),
            "mean": y[t == 1].mean(),
        }
        assert {name: values[place] for name, values in found.items()} == pytest.approx(expected)


def test_intervals_of_auc_cover_the_truth():
    # scores of true ones are one deviation higher: AUC = Phi(1 / sqrt 2); the two rows of a clip share a part, as siblings do
    truth, clips = np.tile([1, 0], 75), np.repeat(np.arange(75), 2)
    expected, covered = norm.cdf(1 / np.sqrt(2)), 0
    for seed in range(200):
        draw = np.random.default_rng(seed)
        scores = truth + np.sqrt(0.5) * draw.normal(size=150) + np.sqrt(0.5) * draw.normal(size=75)[clips]
        found = measures.over_clips({"auc": measures.auc_of(scores, truth)}, clips, n=250, seed=seed)
        covered += found["auc_low"] <= expected <= found["auc_high"]
    assert 180 <= covered <= 199


def test_one_clip_has_no_interval():
    found = measures.over_clips({"mean": measures.mean_of([0.25, 0.75])}, [3, 3])
    assert found["mean"] == 0.5 and np.isnan(found["mean_low"]) and np.isnan(found["mean_high"])
    assert agreement.readable(pd.DataFrame([found]))["mean"].tolist() == ["0.50 [no interval]"]


# ---- planted judges ------------------------------------------------------


def test_a_perfect_judge():
    truth = np.tile([1, 0], 100)
    rows = rows_of(truth, perfect=truth.astype(float))
    line = agreement.accuracy_table(rows, {"perfect": 0.5}).iloc[-1]
    assert line["kind"] == agreement.ALL and line["n"] == 100
    for name in ("balanced_accuracy", "auc", "pair_accuracy"):
        assert line[[name, f"{name}_high"]].tolist() == [1, 1]
        assert line[f"{name}_low"] == pytest.approx(100 / (100 + 1.96**2), abs=1e-4)  # Wilson: 100 clips without a mistake
    error = agreement.calibration_table(rows, ["perfect"]).iloc[0]
    assert error[["ece", "ece_low", "ece_high", "brier", "brier_high", "ece_chance"]].tolist() == [0] * 6
    curve = agreement.reliability_table(rows, ["perfect"])
    assert curve[["n", "mean_score", "share_true"]].to_numpy().tolist() == [[100, 0, 0], [100, 1, 1]]  # equal scores, one bin


def test_a_judge_that_always_says_yes():
    truth = np.tile([1, 0], 100)
    rows = rows_of(truth, yes=0.99)
    line = agreement.accuracy_table(rows, {"yes": 0.5}).iloc[0]
    assert line[["balanced_accuracy", "auc", "pair_accuracy"]].tolist() == [0.5, 0.5, 0.5]
    biases = agreement.yes_table(rows, {"yes": 0.5}).set_index("kind")
    assert biases["share_yes"].tolist() == [1, 1] and biases["mean_score"].tolist() == pytest.approx([0.99] * 2)
    assert biases["share_yes_low"].tolist() == pytest.approx([100 / (100 + 1.96**2)] * 2, abs=1e-4)  # Wilson at 100 of 100
    error = agreement.calibration_table(rows, ["yes"]).iloc[0]
    assert error["ece"] == pytest.approx(0.49) and error["brier"] == pytest.approx(0.5 * 0.01**2 + 0.5 * 0.99**2)


def test_a_judge_too_sure_of_itself():
    # says 0.9 where 7 of 10 are true, 0.1 where 3 of 10 are
    truth = np.tile([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1], 20)
    rows = rows_of(truth, sure=np.tile(np.repeat([0.9, 0.1], 10), 20))
    curve = agreement.reliability_table(rows, ["sure"])
    assert curve["mean_score"].tolist() == pytest.approx([0.1, 0.9]) and curve["share_true"].tolist() == pytest.approx([0.3, 0.7])
    error = agreement.calibration_table(rows, ["sure"]).iloc[0]
    assert error["ece"] == pytest.approx(0.2) and error["brier"] == pytest.approx(0.7 * 0.01 + 0.3 * 0.81)
    assert error["ece_low"] < 0.2 < error["ece_high"] and error["ece_low"] > error["ece_chance"]


@pytest.mark.parametrize("slope", [1.0, 0.9, 0.6])  # of the share of true ones over the score: calibrated, too sure, far too sure
def test_intervals_of_the_calibration_error_cover_it(slope):
    expected, covered, below = 0.25 * (1 - slope), 0, 0  # the mean of |score - 1/2| is 1/4
    for seed in range(50):
        draw = np.random.default_rng([seed, 7])
        scores = draw.random(800)
        truth = (draw.random(800) < 0.5 + slope * (scores - 0.5)).astype(float)
        high = measures.over_clips({"ece": measures.ece_of(scores, truth)}, np.arange(800), n=250)["ece_high"]
        low, chance = measures.ece_floor(scores, truth, n=100)
        covered += low <= expected <= high
        below += measures.once(measures.ece_of(scores, truth), 800) <= chance
    assert covered >= 44
    assert below >= 44 if slope == 1 else below <= 45


def test_bins_hold_equal_counts_and_equal_scores():
    assert measures.bins_of([0.5, 0.1, 0.9, 0.3], 2).tolist() == [1, 0, 1, 0]
    assert np.bincount(measures.bins_of(rng.random(100))).tolist() == [10] * 10
    assert len(set(measures.bins_of([0.2] * 7))) == 1


def test_kinds_of_wrong_captions_stay_apart():
    table = pd.DataFrame({"clip": [0, 0, 0, 1, 1, 1], "kind": [agreement.TRUE, "count", agreement.OTHER] * 2,
                          "truth": [1, 0, 0] * 2, "caption": "x", "a": [0.6, 0.7, 0.1, 0.8, 0.2, 0.1]})  # fmt: skip
    found = agreement.accuracy_table(table, {"a": 0.5}).set_index("kind")
    assert found.index.tolist() == ["count", agreement.ALL, agreement.OTHER]
    assert found["auc"].tolist() == [0.75, 0.75, 1] and found["pair_accuracy"].tolist() == [0.5, 0.5, 1]
    each = agreement.one_wrong_each(table)
    assert each["clip"].tolist() == [0, 0, 1, 1] and each["kind"].tolist() == [agreement.TRUE, "count"] * 2
    recordings = table[table["kind"] != "count"]  # nothing but other clips' captions is known to be wrong
    assert agreement.accuracy_table(recordings, {"a": 0.5})["kind"].tolist() == [agreement.OTHER, agreement.ALL]


# ---- judges and judges ---------------------------------------------------


def test_agreement_of_planted_judges():
    base, groups = rng.permutation((np.arange(80) + 0.5) / 80), np.repeat(np.arange(20), 4)
    scores = {"a": base, "same order": base**3, "reversed": 1 - base, "other": rng.random(80)}
    cuts = {"a": 0.5, "same order": 0.125, "reversed": 0.5, "other": 0.5}
    table = agreement.agreement_table(scores, groups, cuts).set_index(["a", "b"])
    assert table.loc[("a", "same order"), ["spearman", "kappa", "alike"]].tolist() == pytest.approx([1, 1, 1])
    assert table.loc[("a", "reversed"), ["spearman", "kappa", "alike"]].tolist() == pytest.approx([-1, -1, 0])
    assert (table["n"] == 80).all() and (table["pairs"] == 20 * 6).all() and len(table) == 6
    line = table.loc[("a", "other")]
    assert line["spearman_low"] < 0 < line["spearman_high"] and line["alike_low"] < 0.5 < line["alike_high"]


def test_sibling_agreement_compares_within_groups_only():
    quality, groups = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0], [0, 0, 1, 1, 2, 2]
    share, pairs = agreement.sibling_agreement([0.9, 0.1, 0.0, 1.0, 0.3, 0.3], quality, groups)
    assert (share.mean, pairs) == (0.75, 2) and 0.5 <= share.low <= share.high <= 1
    share, pairs = agreement.sibling_agreement([1.0, 2.0], [0.5, 0.5], [0, 0])
    assert np.isnan(share.mean) and pairs == 0


def test_clip_quality_ends():
    judged = {name: torch.tensor(values) for name, values in
              {"tp": [2.0, 0.0, 1.0], "fp": [0.0, 1.0, 0.0], "fn": [0.0, 2.0, 1.0], "exact": [1.0, 0.0, 0.0]}.items()}
    assert agreement.clip_quality(judged).tolist() == pytest.approx([1.0, 0.0, 1 / 3])


def test_the_judge_as_a_reward_says_yes_to_an_exact_match_and_hears_a_sound_once():
    counts, active = torch.zeros(2, 18, dtype=torch.long), torch.zeros(2, 100, 18, dtype=torch.bool)
    dog, owl = scenes.CLASSES.index("dog"), scenes.CLASSES.index("owl")
    counts[:, dog], active[:, :20, dog] = 1, True
    counts[1, owl], active[1, 50:, owl] = 1, True  # the second sound: a dog, then an owl
    heard = []
    judge = SimpleNamespace(detect=lambda audio: heard.append(len(audio)) or (counts, active))
    audio = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.3, 0.2], [0.3, 0.2]])
    dog_first = [["dog", 1], ["owl", 1]]
    records = [{"groups": groups, "relation": "followed by"} for groups in ([["dog", 1]], [["owl", 1]], dog_first, dog_first[::-1])]
    scores = agreement.as_reward(judge)(audio, 16000, [""] * 4, records).scores
    assert heard == [2] and scores.tolist() == [1, 0, 1, 0.5]  # all events, in the wrong order: no exact match


# ---- heard ---------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes6():
    return Corpus.from_scenes(6, split="test", seed=5, workers=1)


def test_a_reward_that_knows_the_captions_is_right_everywhere(scenes6):
    known = {record["caption"] for record in scenes6.records}

    def oracle(audio, sample_rate, prompts, metadata=None):
        scores = torch.tensor([float(p in known) for p in prompts])
        return RewardResult(scores, {"p_yes_mass": torch.ones(len(prompts))})

    rows = agreement.score_captions({"oracle": oracle}, scenes6, wrong=open_world("smoke").wrong_captions)
    table = agreement.accuracy_table(rows, {"oracle": 0.5})
    assert (rows["oracle_yes_mass"] == 1).all() and set(rows["clip"]) == set(range(6))
    assert (table[["balanced_accuracy", "auc", "pair_accuracy"]] == 1).all(axis=None)
    summary = agreement.as_summary(table)
    assert summary["metric"].unique().tolist() == ["pair_accuracy"] and (summary[["mean", "high"]] == 1).all(axis=None)


def test_the_judge_gets_what_each_wrong_caption_asks(scenes6):
    world, seen = open_world("smoke"), []

    def ears(audio, sample_rate, prompts, metadata):
        seen.extend(zip(prompts, metadata, strict=True))
        return RewardResult(torch.zeros(len(prompts)))

    rows = agreement.score_captions({"ears": ears}, scenes6, wrong=world.wrong_records)
    assert rows["caption"].tolist() == agreement.score_captions({}, scenes6, wrong=world.wrong_captions)["caption"].tolist()
    assert all(record["caption"] == prompt and record["groups"] for prompt, record in seen)
    swapped = rows.index[rows["kind"] == "swapped"]
    for place in swapped:
        own = scenes6.records[rows["clip"][place]]["groups"]
        asked = [list(group) for group in seen[place][1]["groups"]]
        assert asked != own and sorted(asked) == sorted(own)


def test_a_clap_hears_a_clip_once_and_scores_as_it_does_alone(scenes6):
    counts = {"clips": 0, "texts": []}

    def embed_audio(audio, sample_rate):
        counts["clips"] += len(audio)
        return torch.nn.functional.normalize(audio[:, ::8000].float(), dim=-1)

    def embed_text(captions):
        counts["texts"] += captions
        return torch.stack([torch.cos(torch.arange(8.0) * len(text)) for text in captions])

    clap = SimpleNamespace(embed_audio=embed_audio, embed_text=embed_text)
    rows = agreement.score_captions({"clap": clap}, scenes6, wrong=open_world("smoke").wrong_captions)
    assert counts["clips"] == 6 and len(counts["texts"]) == len(set(counts["texts"])) == rows["caption"].nunique()
    alone = [(embed_audio(scenes6.waveforms([row.clip]), 16000) * embed_text([row.caption])).sum() for row in rows.itertuples()]
    assert np.allclose(rows["clap"], alone, atol=1e-6)


# ---- figures ---------------------------------------------------------------


def test_the_curve_shows_the_bins_and_the_matrix_its_numbers():
    truth = np.tile([1, 0], 50)
    rows = rows_of(truth, a=np.where(truth > 0, 0.8, 0.4), b=rng.random(100))
    curve, errors = agreement.reliability_table(rows, ["a", "b"]), agreement.calibration_table(rows, ["a", "b"], n=200)
    ax = plots.calibration_curve(curve, errors).axes[0]
    drawn = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "o"]
    assert drawn[0] == [[pytest.approx(0.4), 0], [pytest.approx(0.8), 1]]
    assert ax.get_legend().get_texts()[0].get_text().startswith("a: error 0.300 [")
    table = agreement.agreement_table({name: rows[name] for name in "ab"}, rows["clip"], {"a": 0.5, "b": 0.5}, n=200)
    text = plots.agreement_matrix(table, value="kappa").axes[0].texts[0].get_text()
    assert text.split("\n")[0] == f"{table['kappa'][0]:.2f}" and text.count("[") == 1
