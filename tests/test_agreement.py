"""Agreement of rewards with the truth: by brute force on small numbers, and on scenes with a reward that knows them."""

import itertools

import numpy as np
import pytest
import torch

from resonate_lib.data.corpus import Corpus
from resonate_lib.evaluation import agreement
from resonate_lib.evaluation.worlds import open_world
from resonate_lib.rewards import RewardResult


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 40), rng.integers(0, 2, 40)  # few values: many ties
    pairs = itertools.product(scores[truth == 1], scores[truth == 0])
    expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert agreement.auc(scores, truth) == pytest.approx(expected)
    assert np.isnan(agreement.auc([0.1, 0.2], [1, 1]))


def test_balanced_accuracy_and_threshold():
    scores, truth = [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1]
    assert agreement.best_threshold(scores, truth) == 0.2
    assert agreement.balanced_accuracy(scores, truth, 0.2) == 1.0
    assert agreement.balanced_accuracy(scores, truth, 0.15) == 0.75


def test_sibling_agreement_compares_within_groups_only():
    quality, groups = [1.0, 0.0, 0.5, 0.5, 1.0, 0.0], [0, 0, 1, 1, 2, 2]
    assert agreement.sibling_agreement([0.9, 0.1, 0.0, 1.0, 0.3, 0.3], quality, groups) == (0.75, 2)
    share, pairs = agreement.sibling_agreement([1.0, 2.0], [0.5, 0.5], [0, 0])
    assert np.isnan(share) and pairs == 0


def test_clip_quality_ends():
    judged = {name: torch.tensor(values) for name, values in
              {"tp": [2.0, 0.0, 1.0], "fp": [0.0, 1.0, 0.0], "fn": [0.0, 2.0, 1.0], "exact": [1.0, 0.0, 0.0]}.items()}
    assert agreement.clip_quality(judged).tolist() == pytest.approx([1.0, 0.0, 1 / 3])


def test_a_reward_that_knows_the_captions_is_right_everywhere():
    corpus = Corpus.from_scenes(6, split="test", seed=5, workers=1)
    known = {record["caption"] for record in corpus.records}

    def oracle(audio, sample_rate, prompts, metadata=None):
        scores = torch.tensor([float(p in known) for p in prompts])
        return RewardResult(scores, {"p_yes_mass": torch.ones(len(prompts))})

    rows = agreement.score_captions({"oracle": oracle}, corpus, wrong=open_world("smoke").wrong_captions)
    table = agreement.accuracy_table(rows, {"oracle": 0.5})
    assert (rows["oracle_yes_mass"] == 1).all() and set(rows["clip"]) == set(range(6))
    assert (table[["balanced_accuracy", "auc", "pair_accuracy"]] == 1).all(axis=None)
    assert agreement.as_summary(table)["metric"].unique().tolist() == ["pair_accuracy"]
