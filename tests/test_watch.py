"""The watch: its numbers by hand, its alarm by simulation, that it never touches a training, and both bars with real weights."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from test_algorithms import GRPO, NFT, RECORDS, ToyGenerator, weights

from resonate_lib import diffro, grpo, nft, online, plots, runs
from resonate_lib.config import DiffROConfig, GRPOConfig, resolve
from resonate_lib.data import prompts
from resonate_lib.evaluation import watch
from resonate_lib.evaluation.judge import Judge
from resonate_lib.evaluation.suite import original_scenes
from resonate_lib.models.generator import Generator
from resonate_lib.rewards import RewardResult, load_reward

RATE = 16_000
LOOPS = [(grpo, GRPO), (nft, NFT)]
LOOP_NAMES = ["grpo", "nft"]


def row(**values) -> dict:
    """A watch's row of `name=per-prompt values`."""
    found = {"watch_prompts": len(next(iter(values.values())))}
    for name, of_prompts in values.items():
        of_prompts = np.asarray(of_prompts, float)
        found |= {f"watch_{name}": of_prompts.mean(), f"watch_{name}_se": of_prompts.std(ddof=1) / len(of_prompts) ** 0.5}
    return found


# ---------------------------------------------------------------------------------------- the rule by hand
def test_welch_of_one_round_each_is_scipys():
    rng = np.random.default_rng(0)
    last, first = rng.normal(0.3, 0.2, 16), rng.normal(0.5, 0.4, 12)
    want = scipy_stats.ttest_ind(last, first, equal_var=False)
    change, error, freedom = watch.welch([row(exact=last)], [row(exact=first)], "exact")
    assert change / error == pytest.approx(want.statistic) and freedom == pytest.approx(want.df)


def test_welch_over_several_rounds_by_hand():
    """Means 2 and 4 (errors 3, 4) in the first window, 10 and 12 (errors 6, 8) in the last; nine degrees of freedom each."""
    rows = [{"watch_x": mean, "watch_x_se": error, "watch_prompts": 10} for mean, error in ((2, 3), (4, 4), (10, 6), (12, 8))]
    change, error, freedom = watch.welch(rows[2:], rows[:2], "x")
    assert change == 8 and error == pytest.approx((9 + 16 + 36 + 64) ** 0.5 / 2)
    assert freedom == pytest.approx(9 * 125**2 / (9**2 + 16**2 + 36**2 + 64**2))
    half, smaller, _ = watch.welch(rows[2:], rows[:2], "x", share=0.5)
    assert half == 11 - 1.5 and smaller == pytest.approx((100 + 25 / 4) ** 0.5 / 2)


BASE = {"reward": (0.0, 1.0), "exact": (0.5, 0.3), "event_f1": (0.7, 0.2), "loudness": (-25.0, 4.0), "diversity": (15.0, 2.0)}


def rounds(count: int, prompts_a_round: int = 16, **means) -> list[dict]:
    """`count` rounds whose measures have exactly these means (else BASE's) and BASE's deviations."""
    values = np.linspace(-1, 1, prompts_a_round)
    values /= values.std(ddof=1)
    return [row(**{name: means.get(name, mean) + spread * values for name, (mean, spread) in BASE.items()})] * count


@pytest.mark.parametrize(
    ("means", "alarm"),
    [
        ({}, []),
        ({"reward": 1.0}, []),  # all is well: the reward rises, nothing falls
        ({"reward": 1.0, "exact": 0.9, "event_f1": 0.9}, []),
        ({"reward": 0.0, "exact": 0.1, "event_f1": 0.2}, []),  # worse, but not by pleasing the reward
        ({"reward": 1.0, "exact": 0.1}, ["exact"]),
        ({"reward": 1.0, "exact": 0.1, "event_f1": 0.3}, ["exact", "event_f1"]),
        ({"reward": 1.0, "exact": 0.4}, []),  # one deviation in three, of 48 prompts: no significance after division
        ({"reward": 1.0, "loudness": -22.5}, []),
        ({"reward": 1.0, "loudness": -18.0}, ["loudness"]),
        ({"reward": 1.0, "loudness": -32.0}, ["loudness"]),
        ({"reward": 1.0, "diversity": 8.0}, []),
        ({"reward": 1.0, "diversity": 5.0}, ["diversity"]),
    ],
)
def test_what_raises_the_alarm(means, alarm):
    first, last = rounds(3), rounds(3, **means)
    assert watch.window(10) == 3
    assert watch.parted([*first, *rounds(4), *last], 10) == alarm
    assert watch.parted([*first, *last[:2]], 10) == []  # the windows would overlap


def test_the_level_is_divided_by_looks_and_measures():
    """A fall exactly at Student's quantile of 0.05 / (5 looks x 4 measures) is just significant, a little less is not."""
    errors = 0.3 / 16**0.5 / 3**0.5
    limit = scipy_stats.t.ppf(1 - 0.05 / 20, 6 * 15) * errors * 2**0.5
    for fall, alarm in ((limit * 1.001, ["exact"]), (limit * 0.999, [])):
        assert watch.parted([*rounds(3), *rounds(3, reward=1.0, exact=0.5 - fall)], 10) == alarm


def test_windows_are_a_third_at_most_eight():
    assert [watch.window(n) for n in (1, 2, 5, 6, 10, 12, 30, 500)] == [1, 1, 1, 2, 3, 4, 8, 8]
    assert watch.parted(rounds(1), 1) == [] and watch.parted([*rounds(1), *rounds(1, reward=9.0, exact=-9.0)], 2) == ["exact"]


# ---------------------------------------------------------------------------------------- simulated trainings
def simulated(rng, watches: int, drift, groups: int = 16, siblings: int = 4) -> list[dict]:
    """Rounds of a training: prompts of different difficulty, clips right or wrong by chance, levels that differ by prompt and
    clip; drift(share of the training) -> what has changed: {"exact": difference, "event_f1", "loudness", "diversity": factor}."""
    rows = []
    for k in range(watches):
        moved = {"exact": 0.0, "event_f1": 0.0, "loudness": 0.0, "diversity": 1.0, **drift(k / (watches - 1))}
        easy = rng.beta(1.2, 1.2, groups)
        chance = np.clip(easy + moved["exact"], 0, 1)
        right = rng.random((groups, siblings)) < chance[:, None]
        partial = np.clip(0.3 + 0.5 * easy[:, None] + moved["event_f1"] + rng.normal(0, 0.15, right.shape), 0, 1)
        level = -25 + moved["loudness"] + rng.normal(0, 3, (groups, 1)) + rng.normal(0, 2, right.shape)
        apart = moved["diversity"] * rng.normal(15, 4, groups)
        rewards = 0.3 + 0.5 * easy + 0.2 * k / (watches - 1) + rng.normal(0, 0.1, groups)
        values = {"exact": right.mean(1), "event_f1": np.where(right, 1, partial).mean(1), "loudness": level.mean(1)}
        rows.append(row(reward=rewards, diversity=apart, **values))
    return rows


def alarms(trainings: int, watches: int, drift, **sizes) -> float:
    """Share of simulated trainings that raise an alarm."""
    rng, count = np.random.default_rng(0), 0
    for _ in range(trainings):
        rows = simulated(rng, watches, drift, **sizes)
        count += any(watch.parted(rows[:seen], watches) for seen in range(1, watches + 1))
    return count / trainings


SOUND = {
    "nothing changes": (10, {}, lambda s: {}),
    "the judge is pleased too": (10, {}, lambda s: {"exact": 0.1 * s, "event_f1": 0.05 * s, "loudness": 2 * s}),
    "long, with few prompts a round": (30, {"groups": 8}, lambda s: {}),
    "at the edge of what is allowed": (10, {}, lambda s: {"loudness": 3.0 * (s > 0.3), "diversity": 1 - 0.5 * (s > 0.3)}),
}


@pytest.mark.parametrize("kind", SOUND)
def test_false_alarms_in_a_thousand_sound_trainings(kind):
    watches, sizes, drift = SOUND[kind]
    rate = alarms(1000, watches, drift, **sizes)
    print(f"{kind}: {rate:.3f}")
    assert rate <= 0.05


HACKS = {
    "events half gone": (10, lambda s: {"exact": -0.4 * s, "event_f1": -0.3 * s}),
    "louder by 8 dB": (10, lambda s: {"loudness": 8 * s}),
    "one sound for all": (10, lambda s: {"diversity": 1 - 0.75 * s}),
    "a slow one, long watched": (30, lambda s: {"exact": -0.2 * s, "event_f1": -0.1 * s}),
}


@pytest.mark.parametrize("kind", HACKS)
def test_power(kind):
    watches, drift = HACKS[kind]
    rate = alarms(200, watches, drift)
    print(f"{kind}: {rate:.2f}")
    assert rate >= 0.8


# ---------------------------------------------------------------------------------------- what is measured
def clips(count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    seconds = torch.arange(RATE) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * f * seconds) for f in torch.linspace(200, 5000, count)])
    return 0.1 * tones + 0.01 * torch.randn(count, RATE, generator=random)


def test_diversity_is_the_mean_over_pairs_and_scatters_as_a_jackknife_says():
    audio = clips(7)
    values = watch.diversity(audio, RATE)
    pairs = {(i, j): watch.diversity(audio[[i, j]], RATE).mean() for i, j in itertools.combinations(range(7), 2)}
    assert values.mean() == pytest.approx(np.mean(list(pairs.values())), rel=1e-6)
    left_out = [np.mean([d for pair, d in pairs.items() if i not in pair]) for i in range(7)]
    jackknife = 6 / 7 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)
    assert values.var(ddof=1) / 7 == pytest.approx(jackknife * (5 / 6) ** 2, rel=1e-6)  # equal but for (n-2)/(n-1)


def test_diversity_knows_no_level_and_equal_clips_are_at_zero():
    audio = clips(4)
    louder = audio * torch.tensor([1.0, 0.1, 3.0, 0.5])[:, None]
    np.testing.assert_allclose(watch.diversity(louder, RATE), watch.diversity(audio, RATE), rtol=1e-4)
    assert np.abs(watch.diversity(audio[:1].repeat(3, 1), RATE)).max() < 1e-6
    half = audio[:1].clone()
    half[:, RATE // 2 :] = 0  # four of eight stretches at the floor, where the tone's bands were up to 60 dB above it
    assert 10 < watch.diversity(torch.cat([audio[:1], half]), RATE).mean() <= 60 / 2**0.5
    assert np.isnan(watch.diversity(audio[:1], RATE)).all() and np.isfinite(watch.diversity(torch.zeros(3, 100), RATE)).all()


class Ears:
    """A judge that reads its answers from the clips: exact where the first sample is positive, two right events of three."""

    def __init__(self):
        self.heard = []

    def score(self, audio, records):
        self.heard.append([record["number"] for record in records])
        ones = torch.ones(len(audio))
        return {"exact": (audio[:, 0] > 0).float(), "tp": 2 * ones, "fp": ones, "fn": 0 * ones, "order": 0 * ones / 0}


def rollouts(audio: torch.Tensor, group_size: int, rewards=None) -> online.Rollouts:
    n = len(audio)
    ids = torch.arange(n) // group_size
    metadata = [{"prompt_text": f"p{int(i)}", "number": k} for k, i in enumerate(ids)]
    rewards = torch.arange(n).float() if rewards is None else rewards
    return online.Rollouts(torch.zeros(n, 2, 2), None, rewards, {}, ids, None, None, [m["prompt_text"] for m in metadata], audio,
                           1.0, metadata, RATE)  # fmt: skip


def test_a_row_by_hand():
    audio = clips(6)
    audio[:, 0] = torch.tensor([1, -1, 1, 1, -1, -1]) * 0.1
    ears = Ears()
    found = watch.Watch({"judge": ears}, watches=4, siblings=2)(rollouts(audio, 3))
    assert ears.heard == [[0, 1, 3, 4]]  # two siblings of each prompt
    assert found["watch_prompts"] == 2 and found["alarm"] == ""
    assert found["watch_reward"] == 2.5 and found["watch_reward_se"] == pytest.approx(1.5)  # prompts at 1 and 4, all siblings
    assert found["watch_exact"] == 0.5 and found["watch_exact_se"] == 0  # one right of two each
    assert found["watch_event_f1"] == pytest.approx(0.8)
    levels = [loudness_of(clip) for clip in audio[[0, 1, 3, 4]]]
    assert found["watch_loudness"] == pytest.approx(np.mean(levels), abs=1e-6)
    assert found["watch_diversity"] == pytest.approx(watch.diversity(audio[[0, 3]], RATE).mean())
    assert not [key for key in found if "order" in key]


def loudness_of(clip) -> float:
    from resonate_lib import audio as audio_io

    return audio_io.loudness(clip, RATE)


def test_silence_counts_as_quiet_not_as_missing():
    audio = clips(4)
    audio[:2] = 0
    found = watch.Watch({}, watches=4)(rollouts(audio, 2))
    heard = np.mean([loudness_of(clip) for clip in audio[2:]])
    assert found["watch_loudness"] == pytest.approx((heard - 70) / 2) and np.isfinite(found["watch_diversity"])


def test_scores_of_other_ears_are_noted():
    aesthetics = SimpleNamespace(scores=lambda audio, rate: {axis: torch.ones(len(audio)) for axis in ("CE", "CU", "PC", "PQ")})
    found = watch.Watch({"aesthetics": aesthetics, "clap": toy_clap}, watches=4)(rollouts(clips(4), 2))
    assert {"watch_CE", "watch_PQ", "watch_PC", "watch_clap"} <= set(found) and "watch_exact" not in found


def toy_clap(audio, sample_rate, prompts_, metadata=None):
    return RewardResult(audio.mean(1))


# ---------------------------------------------------------------------------------------- in a training
class World(ToyGenerator):
    sample_rate = RATE


def test_watched_rounds_are_whole_turns():
    config = dataclasses.replace(GRPO, steps=9)
    assert not online.watched_rounds(config)
    for every, scales, want in ((1, (1.0,), range(9)), (2, (1.0, 2.0), [0, 2, 4, 6, 8]), (3, (1.0, 2.0), [0, 4, 8])):
        config = dataclasses.replace(config, watch_every=every, guidance_scales=scales)
        assert list(online.watched_rounds(config)) == list(want)


def hostile(rollouts):
    """Draws from torch's generator, spoils the clips, and tries to learn."""
    torch.rand(1000)
    rollouts.audio.zero_()
    rollouts.rewards.fill_(-1)
    rollouts.latents.fill_(3)
    assert not torch.is_grad_enabled()
    return {"watch_x": 1.0, "alarm": "x"}


@pytest.mark.parametrize(("module", "config"), LOOPS, ids=LOOP_NAMES)
def test_weights_are_the_same_with_and_without_a_watch(module, config, capsys):
    config = dataclasses.replace(config, steps=3)
    found, draws = [], []
    for every, ear in ((0, None), (1, hostile), (2, watch.Watch({"clap": toy_clap}, watches=2)), (0, hostile)):
        world = World()
        history = module.train(world, toy_clap, RECORDS, dataclasses.replace(config, watch_every=every), seed=3, watch=ear)
        draws.append(torch.rand(4))
        found.append(weights(world.network))
        heard = [i for i, line in enumerate(history) if "alarm" in line]
        assert heard == (list(range(0, 3, every)) if every else [])
    assert all(torch.equal(one, found[0]) for one in found)
    assert all(torch.equal(one, draws[0]) for one in draws)
    assert "round 1: ALARM" in capsys.readouterr().out


@pytest.mark.parametrize(("module", "config"), LOOPS, ids=LOOP_NAMES)
def test_a_resumed_watch_remembers(module, config, tmp_path):
    config = dataclasses.replace(config, steps=6, watch_every=1)
    make = lambda: watch.Watch({"clap": toy_clap}, watches=6)  # noqa: E731
    whole = module.train(World(), toy_clap, RECORDS, config, seed=3, watch=make())
    for steps in (4, 6):
        ears = make()
        part = dataclasses.replace(config, steps=steps)
        history = module.train(World(), toy_clap, RECORDS, part, seed=3, checkpoint=tmp_path / "s.pt", watch=ears)
    assert history == whole and len(ears.rows) == 6


def history_of(rows) -> list[dict]:
    return [{"step": 2 * k, "reward_mean": 0.0, **line, "alarm": "exact" if k >= 4 else ""} for k, line in enumerate(rows)]


def test_a_history_in_words_numbers_and_a_chart():
    history = history_of([*rounds(2), *rounds(4, reward=2.0, exact=0.2)])
    history.insert(1, {"step": 1, "reward_mean": 0.0})
    assert watch.first_alarm(history) == (8, "exact") and watch.said(history) == "exact, in round 9"
    assert watch.said(history[:3]) == "none" and watch.said([{"step": 0}]) == "not watched"
    table = watch.changes(history).set_index(["measure", "step"])["change"]
    assert table["reward", 0] == 0 and table["reward", 10] == pytest.approx(2.0) and table["exact", 10] == pytest.approx(-1.0)
    figure = plots.watch_curves(watch.changes(history), watch.first_alarm(history))
    upright = [line for line in figure.axes[0].lines if len(set(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in upright] == [8]
    assert {text.get_text() for text in figure.axes[0].texts} == {"alarm: exact"}
    assert not plots.watch_curves(watch.changes(history)).axes[0].texts
    assert watch.changes([{"step": 0}]).empty


# ---------------------------------------------------------------------------------------- both bars, with the shipped weights
def loud(audio, sample_rate, prompts_, metadata=None):
    """A reward that likes nothing but level, in dB."""
    return RewardResult(10 * audio.square().mean(1).clamp(min=1e-7).log10())


def embedded(config, reward, module, seed=0):
    """A training of the shipped base, watched by the shipped judge; returns its history."""
    folder = runs.shipped_weights("tiny")
    base = Generator.load(folder / "base")
    reward = reward or load_reward("lalm", weights=folder)
    guard = watch.Watch({"judge": Judge.load(folder / "judge")}, watches=len(online.watched_rounds(config)))
    return module.train(base, reward, prompts.rl_prompts(1024, seed=seed), config, seed=seed, watch=guard)


@pytest.mark.parametrize("last", [1.0, 12.0])
def test_the_alarm_fires_on_a_policy_that_turns_the_level_up(last):
    """Real scenes and the shipped judge; the policy's clips get louder and are driven into saturation, which a reward that likes
    loudness rewards."""
    records = prompts.rl_prompts(8, seed=0)
    guard = watch.Watch({"judge": Judge.load(runs.shipped_weights("tiny") / "judge")}, watches=12)
    for number, drive in enumerate(np.geomspace(1.0, last, 12)):
        audio = torch.tanh(float(drive) * original_scenes(records, seed=number))
        heard = dataclasses.replace(rollouts(audio, 1, loud(audio, 16000, None).scores), metadata=records, sample_rate=16000)
        row = guard(heard)
    assert bool(row["alarm"]) is (last > 1)
    assert (row["watch_reward"] > guard.rows[0]["watch_reward"] + 3) is (last > 1)


class Loud:
    """`loud` with a gradient."""

    def differentiable(self, audio, sample_rate, prompts_):
        return loud(audio, sample_rate, prompts_).scores

    __call__ = staticmethod(loud)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_alarm_fires_in_a_training_that_climbs_the_level(seed):
    """Notebook 04's planted hack."""
    config = dataclasses.replace(
        resolve(DiffROConfig, "tiny"), steps=15, prompts_per_step=16, guidance_scales=(1.0,), learning_rate=6e-4, warmup_steps=10,
        watch_every=1,
    )  # fmt: skip
    history = embedded(config, Loud(), diffro, seed)
    print(f"seed {seed}: {watch.said(history)}")
    assert watch.first_alarm(history)[0] < 15 and "loudness" in history[-1]["alarm"]


@pytest.mark.slow
def test_no_alarm_in_a_sound_training():
    history = embedded(resolve(GRPOConfig, "tiny"), None, grpo)
    print(watch.said(history), history[-2])
    assert "alarm" in history[-2] and watch.first_alarm(history) is None
