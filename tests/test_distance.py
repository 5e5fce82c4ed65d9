"""Fréchet distance, KL, duplicates and diversity against closed forms, numbers by hand and planted copies."""

import math
import types

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import sqrtm

from resonate_lib import audio as audio_io
from resonate_lib.data import prompts, scenes
from resonate_lib.evaluation import distance, embedders, metrics, suite, ttabench
from resonate_lib.evaluation.embedders import Clips, Embedder, Heard
from resonate_lib.evaluation.judge import Judge
from resonate_lib.rewards import load_reward
from resonate_lib.rewards.base import SHIPPED


def exactly(mean, covariance, size=400, seed=0):
    """Vectors (size, D) whose sample mean and sample covariance are these, to rounding."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    raw = np.random.default_rng(seed).normal(size=(size, len(mean)))
    raw -= raw.mean(axis=0)
    white = np.linalg.solve(np.linalg.cholesky(np.cov(raw.T)), raw.T).T
    return mean + white @ np.linalg.cholesky(covariance).T


def clips(name, vectors, ids=None, embedding="toy", seconds=4.0):
    return Clips(name, vectors, np.arange(len(vectors)) if ids is None else np.asarray(ids), embedding, seconds)


# --- Fréchet distance -----------------------------------------------------------------------------------------------------------


def test_closed_forms_of_the_frechet_distance():
    covariance = np.array([[2.0, 0.6, 0.1], [0.6, 1.0, -0.2], [0.1, -0.2, 0.5]])
    a = exactly([0, 0, 0], covariance)
    assert distance.frechet(a, a) == pytest.approx(0, abs=1e-12)
    # one covariance, shifted mean: the squared shift
    assert distance.frechet(a, exactly([1, -2, 2], covariance, seed=1)) == pytest.approx(9, abs=1e-9)
    # diagonal covariances: the squared differences of deviations, 1 + 4 + 0
    left, right = exactly([0, 0, 0], np.diag([1.0, 9, 4])), exactly([0, 0, 0], np.diag([4.0, 1, 4]), size=300, seed=2)
    assert distance.frechet(left, right) == pytest.approx(5, abs=1e-9)
    # one covariance is c² times the other: (1 - c)² of the trace
    assert distance.frechet(a, exactly([0, 0, 0], 9 * covariance, seed=3)) == pytest.approx(4 * 3.5, abs=1e-9)


def test_the_frechet_distance_is_the_formula_with_a_matrix_square_root():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(90, 7)) @ rng.normal(size=(7, 7)), 1 + rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7))
    s, t = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert distance.frechet(a, b) == pytest.approx(wanted, rel=1e-9)
    assert distance.frechet(b, a) == pytest.approx(wanted, rel=1e-9)
    assert distance.frechet(1e6 + a, 1e6 + b) == pytest.approx(wanted, rel=1e-6)  # far from the origin


def test_fewer_clips_than_dimensions():
    # two clips each, on one axis: deviations 1 and 3 in the first of 50 dimensions, means 0 and 2 in the last
    a, b = np.zeros((2, 50)), np.zeros((2, 50))
    a[:, 0], b[:, 0], b[:, 49] = [-(0.5**0.5), 0.5**0.5], [-3 * 0.5**0.5, 3 * 0.5**0.5], 2
    assert distance.frechet(a, b) == pytest.approx(4 + 4, abs=1e-9)
    assert distance.frechet(a, a) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="2 or more clips"):
        distance.frechet(a[:1], b)


def test_the_table_states_all_that_a_distance_needs():
    base, better = clips("base", exactly([2, 0], np.eye(2), 40)), clips("tuned", exactly([1, 0], np.eye(2), 40))
    reference, second = clips("originals", exactly([0, 0], np.eye(2), 40)), clips("more", exactly([0, 0.5], np.eye(2), 40))
    table = distance.frechet_table([base, better], reference, second)
    assert tuple(table.columns) == distance.FRECHET_COLUMNS
    line = table.set_index("system").loc["tuned"]
    assert line["embedding"] == "toy" and line["reference"] == "originals" and line["clip_seconds"] == 4
    assert (line["clips"], line["reference_clips"], line["floor_clips"], line["prompts"]) == (40, 40, 40, 40)
    assert (line["distance"], line["floor"]) == pytest.approx((1, 0.25), abs=1e-9)
    assert line["floor_sets"] == "originals and more"
    assert line["gain"] == pytest.approx(1 - 4, abs=1e-9) and line["gain_low"] < -3 < line["gain_high"] < 0
    assert line["low"] < line["distance"] < line["high"] and line["floor_low"] < line["floor"] < line["floor_high"]
    assert np.isnan(table["gain"][0])
    fewer = clips("tuned", better.vectors[:30])
    assert np.isnan(distance.frechet_table([base, fewer], reference, second)["gain"]).all()  # 40 clips against 30


def test_without_a_second_set_the_floor_is_that_of_halves():
    vectors = np.random.default_rng(0).normal(size=(60, 3))
    table = distance.frechet_table([clips("base", vectors + 1)], clips("originals", vectors, np.repeat(np.arange(30), 2)))
    assert table["floor_sets"][0] == "one half of originals and the other half of originals"
    assert table["floor_clips"][0] == 30 and 0 < table["floor"][0] < table["distance"][0]


def test_sets_that_cannot_be_compared_are_refused():
    a = clips("a", np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(ValueError, match="use one embedder"):
        distance.frechet_table([a], clips("b", a.vectors + 1, embedding="other"))
    with pytest.raises(ValueError, match="use one length"):
        distance.frechet_table([a], clips("b", a.vectors + 1, seconds=10.0))
    with pytest.raises(ValueError, match="a name of its own"):
        distance.frechet_table([a], clips("a", a.vectors + 1))
    with pytest.raises(ValueError, match="reference's own clips"):
        distance.frechet_table([a], clips("b", a.vectors + 1), clips("c", a.vectors + 1))
    with pytest.raises(ValueError, match="not finite"):
        clips("a", np.full((3, 2), np.nan))
    with pytest.warns(UserWarning, match="'a' 20"):
        distance.frechet_table([clips("a", np.random.default_rng(0).normal(size=(20, 30)))], clips("b", np.eye(40, 30)))


def test_the_interval_is_the_jackknife_over_prompts():
    """As many blocks as prompts: leaving each prompt out of both sets by hand."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(1, 1, size=(12, 2)), rng.normal(size=(12, 2))
    ids = np.repeat(np.arange(6), 2)
    table = distance.frechet_table([clips("base", a, ids)], clips("originals", b, ids), blocks=50)
    parts = np.array([distance.frechet(a[ids != i], b[ids != i]) for i in range(6)])
    whole, error = distance.frechet(a, b), math.sqrt(5 / 6 * ((parts - parts.mean()) ** 2).sum())
    assert table["high"][0] == pytest.approx(whole + 2.5706 * error, rel=1e-4)  # t of 5 degrees of freedom
    assert table["unbiased"][0] == pytest.approx(6 * whole - 5 * parts.mean(), rel=1e-9)


def simulated(trials, size, shift, *, blocks=20, first=0):
    """Tables of normal sets in 8 dimensions, deviations 1.5 against 1; the true distance of "base" and gain of "tuned".

    first: the number of the reference's first prompt, 0 where it has the systems' prompts.
    """
    rng, tables = np.random.default_rng(7), []
    for _ in range(trials):
        base, tuned = (rng.normal(mean, 1.5, size=(size, 8)) for mean in (shift, shift / 2))
        systems = [clips("base", base), clips("tuned", tuned)]
        originals = clips("originals", rng.normal(size=(size, 8)), first + np.arange(size))
        tables.append(distance.frechet_table(systems, originals, blocks=blocks))
    return pd.concat(tables).set_index("system"), 8 * (shift**2 + 0.25), -6 * shift**2


def test_few_clips_make_the_distance_too_large_and_the_jackknife_takes_it_back():
    table, truth, gain = simulated(60, 200, 1.0, blocks=10)
    base, tuned = table.loc["base"], table.loc["tuned"]
    assert abs(base["unbiased"].mean() - truth) < 3 * base["unbiased"].std() / math.sqrt(60)
    assert (base["distance"] - base["unbiased"]).min() > 8 * (2.25 + 1) / 200  # what the means alone add
    assert tuned["gain"].mean() == pytest.approx(gain, abs=0.25) and (tuned["gain_high"] < 0).all()
    assert (base["floor"] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("size, shift, first", [(100, 1.0, 0), (200, 0.5, 0), (200, 0.5, 200)])
def test_coverage_of_the_frechet_intervals(size, shift, first):
    """Over 1,000 sets: the unbiased distance and the gain hold the truth, the plain distance what so many clips give on average."""
    table, truth, gain = simulated(1000, size, shift, first=first)
    base, tuned = table.loc["base"], table.loc["tuned"]
    for low, true, high in (
        (base["unbiased_low"], truth, base["unbiased_high"]),
        (base["low"], base["distance"].mean(), base["high"]),
        (tuned["gain_low"], gain, tuned["gain_high"]),
    ):
        assert 0.93 <= ((low <= true) & (true <= high)).mean() <= 0.97


# --- KL -------------------------------------------------------------------------------------------------------------------------


def test_kl_of_known_distributions():
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    assert distance.kl(p, q, "softmax") == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], abs=1e-5)
    assert distance.kl(q, p, "softmax") == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)], abs=1e-5)
    # two classes, each a yes or no: 0.5 against 0.25, and the same on both sides
    logits = lambda *x: np.log(x) - np.log1p(-np.array(x))  # noqa: E731
    a, b = logits(0.5, 0.9)[None], logits(0.25, 0.9)[None]
    assert distance.kl(a, b, "sigmoid") == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)], abs=1e-5)
    for kind in distance.KINDS:
        assert distance.kl(a, a, kind) == pytest.approx([0], abs=1e-12)
        sure = distance.kl(np.array([[90.0, -90]]), np.array([[-90.0, 90]]), kind)[0]
        assert sure == pytest.approx((1 if kind == "softmax" else 2) * math.log(1e6), rel=1e-4)
    with pytest.raises(ValueError, match="softmax, sigmoid"):
        distance.kl(a, b, "tanh")


def test_the_published_kl_is_torchs_and_may_be_negative():
    rng = np.random.default_rng(0)
    reference, generated = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    r, g = torch.tensor(reference), torch.tensor(generated)
    for kind, squash in (("softmax", lambda x: x.softmax(dim=1)), ("sigmoid", torch.sigmoid)):
        wanted = torch.nn.functional.kl_div((squash(g) + 1e-6).log(), squash(r), reduction="sum") / 5
        assert distance.kl(reference, generated, kind, published=True).mean() == pytest.approx(float(wanted))
    # absent in the original, half there in the generated one: the published formula rewards it
    assert distance.kl(np.array([[-2.0]]), np.array([[0.0]]), "sigmoid", published=True)[0] < 0
    assert distance.kl(np.array([[-2.0]]), np.array([[0.0]]), "sigmoid")[0] > 0


def test_kl_pairs_clips_by_prompt():
    logits = np.random.default_rng(3).normal(size=(12, 5))
    ids = np.array([f"p{i}" for i in range(12)])
    reference, second = clips("originals", logits, ids), clips("more", logits[::-1] + 0.1, ids[::-1])
    same, worse = clips("base", logits[::-1], ids[::-1]), clips("tuned", np.roll(logits, 1, axis=0)[::-1], ids[::-1])
    table = distance.kl_table([same, worse], reference, second, kind="softmax").set_index("system")
    assert table.loc["base", "kl"] == pytest.approx(0, abs=1e-12)
    assert table["floor"].tolist() == pytest.approx([0, 0], abs=1e-12)  # softmax does not see a constant
    assert table.loc["tuned", "gain_low"] > 0 and table.loc["tuned", "prompts"] == 12
    with pytest.raises(ValueError, match="no original, such as prompt 'x'"):
        distance.kl_table([clips("base", logits[:2], ["p0", "x"])], reference, kind="softmax")
    with pytest.raises(ValueError, match="one original a prompt"):
        distance.kl_table([same], clips("originals", logits, ["p0"] * 12), kind="softmax")


# --- duplicates and diversity ---------------------------------------------------------------------------------------------------


def test_duplicates_are_planted_copies_and_nothing_else():
    sounds = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, size=(12, 32000)).astype("float32"))
    sounds[3] = 0.2 * sounds[7]  # a copy, quieter
    sounds[1:3] = 0  # two silent clips are no copies
    prints = embedders.fingerprint().embed(sounds, 16000)
    assert np.flatnonzero(metrics.duplicates(prints)).tolist() == [3, 7]
    assert metrics.nearest_cosine(prints)[[1, 2, 3]] == pytest.approx([0, 0, 1], abs=1e-5)
    again = embedders.fingerprint().embed(-sounds.repeat_interleave(2, dim=1), 32000)  # upside down, at another rate
    assert (again * prints).sum(-1)[[0, 3, 5]].min() > 0.9


def test_share_of_duplicates_by_hand():
    found = np.array([True, True] + [False] * 98)
    share = metrics.duplicate_share(found, np.arange(100))
    # Wilson's interval for 1 of 50
    z2 = 1.959964**2
    centre, half = (1 / 50 + z2 / 100) / (1 + z2 / 50), 1.959964 / (1 + z2 / 50) * math.sqrt(0.02 * 0.98 / 50 + z2 / 10000)
    assert share == pytest.approx((0.02, centre - half, centre + half), abs=1e-6)
    assert metrics.duplicate_share(found, np.repeat(np.arange(10), 10)).high > share.high  # ten prompts of ten
    none = metrics.duplicate_share(~found & found, np.arange(100))
    assert none.mean == 0 and none.low == 0 and 0.05 < none.high < 0.1


def test_the_interval_of_duplicates_holds_the_truth():
    """Copies in pairs, by chance: the share of clips in a pair moves twice as much as that of independent clips would."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        pairs = rng.random(100) < 0.1  # a hundred pairs of clips, one in ten of them copies
        share = metrics.duplicate_share(np.repeat(pairs, 2), np.arange(200))
        held += share.low <= 0.1 <= share.high
    assert 0.93 <= held / 1000 <= 0.97, held


def test_diversity_of_siblings_by_hand():
    x, y = [1.0, 0.0], [0.0, 2.0]  # lengths do not matter
    assert metrics.diversity([x, y], ["p", "p"]).mean == pytest.approx(1)
    assert metrics.diversity([x, x, x], ["p", "p", "p"]).mean == pytest.approx(0)
    # p: pairs 0, 1, 1 -> 2/3; q: opposite, 2; r has no sibling
    found = metrics.diversity([x, x, y, x, [-3, 0], y], list("pppqqr"))
    assert found.mean == pytest.approx((2 / 3 + 2) / 2) and found.low < found.mean < found.high
    assert np.isnan(metrics.diversity([x, y], ["p", "q"]).mean)


def test_variety_table():
    rng = np.random.default_rng(0)
    vectors, ids = rng.normal(size=(20, 6)), np.repeat(np.arange(10), 2)
    copies = vectors.copy()
    copies[4] = 3 * copies[9]
    sets = [clips("base", vectors, ids), clips("tuned", copies, ids)]
    prints = [clips("base", np.eye(20), ids), clips("tuned", copies, ids)]
    table = metrics.variety_table(prints, sets)
    assert table["duplicates"].tolist()[0] == 0 and table["threshold"][0] == metrics.DUPLICATE
    assert table.loc[1, "duplicates_low"] < table.loc[1, "duplicates"] < table.loc[1, "duplicates_high"]
    assert table["diversity"][0] == pytest.approx(metrics.diversity(vectors, ids).mean)
    with pytest.raises(ValueError, match="one order"):
        metrics.variety_table(sets[::-1], sets)


# --- what is heard --------------------------------------------------------------------------------------------------------------


def test_heard_clips_are_found_again_by_rows_in_any_order():
    audio = torch.randn(6, 8000, generator=torch.Generator().manual_seed(0)) / 10
    heard = Heard([Embedder("mean", lambda sound, rate: sound[:, :3]), embedders.fingerprint()])
    records = [{"id": f"p{i}", "prompt_text": "x"} for i in range(6)]
    rows = ttabench.score_clips(audio, records, {"heard": heard}, sample_rate=16000, label="base")
    chosen = rows.iloc[[4, 1, 2]]
    found = heard.clips(chosen, "mean", "base")
    assert found.vectors == pytest.approx(audio[[4, 1, 2], :3].numpy())
    assert found.ids.tolist() == ["p4", "p1", "p2"] and found.seconds == 0.5
    assert [s.name for s in heard.by_system(rows, "fingerprint")] == ["base"]
    with pytest.raises(ValueError, match="1 of 3 rows"):
        heard.clips(chosen.assign(sound=[7.0, *chosen["sound"][1:]]), "mean", "base")
    with pytest.raises(ValueError, match="mean, fingerprint"):
        heard.clips(rows, "clap", "base")


def test_a_sound_has_one_number_and_other_sounds_have_others():
    heard, sounds = Heard([]), torch.randn(50, 100, generator=torch.Generator().manual_seed(0))
    numbers = heard.scores(sounds, 100)["sound"]
    assert len(set(numbers.tolist())) == 50 and all(number == int(number) for number in numbers.tolist())
    assert heard.scores(sounds.flip(0).clone(), 100)["sound"].flip(0).tolist() == numbers.tolist()


def test_zero_shot_is_the_scaled_cosine_to_each_phrase():
    class Toy:
        model = types.SimpleNamespace(logit_scale_a=torch.tensor(math.log(20.0)))

        def embed_audio(self, audio, sample_rate):
            return audio

        def embed_text(self, phrases):
            return torch.eye(3)[: len(phrases)]

    found = embedders.zero_shot(Toy(), ["dog", "rain", "dog", "horn"], "toy CLAP")
    assert found.name == "toy CLAP, zero-shot over 3 phrases"
    assert torch.allclose(found.embed(torch.tensor([[0.6, 0.8, 0.0]]), 16000), torch.tensor([[12.0, 16.0, 0.0]]))
    with pytest.raises(ValueError, match="two or more"):
        embedders.zero_shot(Toy(), ["dog", "dog"], "toy CLAP")


def test_event_phrases():
    records = [{"event_list": ["Dog x3", "rain"], "prompt_text": "-"}, {"event_list": ["Rain"]}, {"prompt_text": "A horn"}]
    assert embedders.event_phrases(records) == ["dog", "rain", "a horn"]


def test_the_judge_hears_an_event_just_where_its_logit_passes_the_threshold():
    judge = Judge.load(SHIPPED / "judge")
    records = prompts.embedded_bench(count=8)
    audio = suite.original_scenes(records)
    features, logits = judge.hear(audio)
    assert features.shape == (8, judge.config["width"]) and logits.shape == (8, len(scenes.CLASSES))
    assert torch.equal(logits.sigmoid() > judge.threshold, judge.detect(audio)[0] > 0)
    assert torch.equal(embedders.judge_events(judge).embed(audio, 16000), logits)
    half = embedders.judge_events(judge).embed(audio_io.resample(audio, 16000, 32000), 32000)
    assert torch.nn.functional.cosine_similarity(half, logits).min() > 0.97


@pytest.mark.slow
def test_the_rule_for_duplicates_on_scenes_and_on_planted_copies():
    """Among originals hardly any clip has a duplicate; a copy that is quieter, noisier or through the codec is found."""
    from resonate_lib.models.generator import Generator

    records = prompts.embedded_bench(count=200)
    originals = suite.original_scenes(records)
    prints = embedders.fingerprint()
    assert metrics.duplicates(prints.embed(originals, 16000)).mean() == 0
    generator = Generator.load(SHIPPED / "base")
    copied = originals[:40]
    noise = torch.randn(copied.shape, generator=torch.Generator().manual_seed(0)) * copied.std(dim=1, keepdim=True)
    for name, copy in {
        "quieter": 0.1 * copied,
        "20 dB over noise": copied + 0.1 * noise,
        "codec": generator.decode(generator.encode_audio(copied), iterations=16)[:, :64000],
    }.items():
        found = metrics.duplicates(prints.embed(torch.cat([originals, copy]), 16000))[200:]
        assert found.mean() >= 0.9, name


def test_shipped_clap_is_an_embedder():
    clap = load_reward("clap").reward
    audio = suite.original_scenes(prompts.embedded_bench(count=4))
    found = embedders.embed_clips(embedders.clap_space(clap, "training CLAP"), audio, 16000, list("abcd"), "originals")
    assert found.vectors.shape == (4, 128) and found.embedding == "training CLAP" and found.seconds == 4
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
