"""Equal numbers of clips, learning against clips and seconds, and where the reward is fooled: each by hand."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_algorithms import RECORDS, ToyGenerator, toy_reward, weights

from resonate_lib import dpo, record, seeds, training, versions
from resonate_lib.config import DPOConfig, GRPOConfig, NFTConfig, PPOConfig, resolve
from resonate_lib.evaluation import efficiency, report, stats
from resonate_lib.runs import write_table


# ---------------------------------------------------------------------------------------- equal numbers of clips
@pytest.mark.parametrize(
    ("config", "clips", "steps", "size"),
    [
        (GRPOConfig(prompts_per_step=16, group_size=12), 3840, 20, 16),
        (NFTConfig(prompts_per_step=16, group_size=12), 3600, 20, 15),  # 300 groups: of 15 nearer than of 20
        (PPOConfig(prompts_per_step=4, group_size=4), 16, 1, 4),
        (NFTConfig(prompts_per_step=8, group_size=16), 16 * 11, 1, 11),
        (DPOConfig(pairs=192, steps=80, batch_size=32), 3840, 80, 1920),  # 60 steps of 32 would see each of 1,920 pairs
        (DPOConfig(pairs=192, steps=20, batch_size=32), 3840, 60, 1920),
        (DPOConfig(pairs=96, steps=4000, fresh_every=2), 1920, 20, 96),  # ten rounds of 96 pairs, two steps each
    ],
)
def test_as_many_clips_by_hand(config, clips, steps, size):
    made = efficiency.at_clips(config, clips)
    assert efficiency.clips_made(made) == clips and type(made) is type(config)
    assert (made.steps, made.pairs if isinstance(config, DPOConfig) else made.prompts_per_step) == (steps, size)
    assert getattr(made, "group_size", 0) == getattr(config, "group_size", 0) and made.reward == config.reward


@pytest.mark.parametrize(
    ("config", "clips"),
    [(GRPOConfig(group_size=12), 3841), (GRPOConfig(prompts_per_step=16, group_size=12), 12 * 37), (DPOConfig(), 3841)],
)
def test_what_cannot_be_equal_is_an_error(config, clips):
    with pytest.raises(ValueError, match=rf"{clips} clips cannot be made in equal rounds of .* use other steps"):
        efficiency.at_clips(config, clips)


# ---------------------------------------------------------------------------------------- clips and seconds
@pytest.mark.parametrize(
    ("config", "clips"),
    [
        (GRPOConfig(prompts_per_step=4, group_size=3), [12, 24, 36, 48]),
        (DPOConfig(pairs=10), [20, 20, 20, 20]),
        (DPOConfig(pairs=10, fresh_every=2, steps=4), [20, 20, 40, 40]),
    ],
)
def test_clips_by_a_step(config, clips):
    assert [efficiency.clips_by(config, i) for i in range(4)] == clips


def test_the_clock_counts_rounds_and_not_pauses(monkeypatch, tmp_path):
    now, state = [100.0], tmp_path / "state.pt"
    monkeypatch.setattr(efficiency, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = efficiency.Clock(state)
    for i, passed in enumerate((5.0, 7.0, 9.0)):
        now[0] += passed
        with clock.paused():
            now[0] += 1000
        efficiency.Unpaid(lambda rollouts: now.__setitem__(0, now[0] + rollouts), clock)(500)
        clock(i, {})
    assert clock.at == [5.0, 12.0, 21.0]
    training.save_state(state, {}, [{"step": 0}, {"step": 1}], 2, 30.0)  # killed in the third round, after it was timed
    resumed = efficiency.Clock(state)
    now[0] += 400  # what is made again, and the round
    resumed(2, {})
    now[0] += 3
    resumed(3, {})
    assert resumed.at == [5.0, 12.0, 18.0, 21.0]  # the round after the interruption counts 6, as those before it on average
    assert efficiency.Clock(state).at == [5.0, 12.0] and efficiency.Clock().at == []


def test_a_watch_that_is_not_paid_keeps_its_state():
    watch = SimpleNamespace(state_dict=lambda: {"rows": [1]}, load_state_dict=None)
    assert efficiency.Unpaid(watch, efficiency.Clock()).state_dict() == {"rows": [1]}


def test_a_curve_has_clips_seconds_gain_and_what_the_probe_heard():
    start = {"probe_mean": 1.0, "probe_std": 0.5, "probe_exact": 0.1}
    history = [{"step": 0, "loss": 3.0}, {"step": 1, "probe_mean": 1.25, "probe_std": 0.2, "probe_exact": 0.2}]
    history += [{"step": 2, "probe_mean": 1.75, "probe_std": 0.2, "probe_exact": 0.4}]
    curve = efficiency.learning_curve(history, GRPOConfig(prompts_per_step=4, group_size=3), [5.0, 6.0, 7.0], start)
    assert [(row["clips"], row["seconds"]) for row in curve] == [(0, 0.0), (24, 6.0), (36, 7.0)]
    assert [row["gain"] for row in curve] == pytest.approx([0, 0.5, 1.5]) and curve[1]["probe_exact"] == 0.2
    assert [(row["clips_from"], row["seconds_from"]) for row in curve] == [(0, 0.0), (12, 5.0), (36, 7.0)]
    offline = efficiency.learning_curve(history, DPOConfig(pairs=6), [5.0, 6.0, 7.0], start)  # all its clips come first
    assert [(row["clips_from"], row["clips"]) for row in offline] == [(0, 0), (12, 12), (12, 12)]


def test_reached_is_where_a_gain_stays():
    curve = [{"gain": gain, "clips": 10 * i} for i, gain in enumerate([0.0, 3.0, 0.5, 0.9, 1.3, 1.0])]
    assert efficiency.reached(curve, 0.5)["clips"] == 10 and efficiency.reached(curve, 1.0)["clips"] == 40
    assert efficiency.reached(curve, 2.0) is None and efficiency.reached(curve[:2], 2.0)["clips"] == 10  # the last look of all


def test_fewest_names_whoever_may_have_been_first():
    rows = {"PPO": (20, 40), "GRPO": (30, 50), "NFT": (41, 60), "DPO": None}
    reached = {name: row and {"clips_from": row[0], "clips": row[1]} for name, row in rows.items()}
    assert efficiency.fewest(reached, "clips") == ["PPO", "GRPO"]
    assert efficiency.fewest({"DPO": None}, "clips") == []


def test_clips_to_a_gain_over_seeds_count_what_was_not_reached():
    taken = {"PPO": [30, 10, 20], "GRPO": [10, None, 40], "DPO": [None, 20, None], "NFT": [None, None, None]}
    rows = pd.DataFrame([{"method": name, "gain": 0.5, "of_clips": 60, "clips": clips} for name in taken for clips in taken[name]])
    table = efficiency.reach_over_seeds(rows).set_index("method")
    assert table["seeds"].eq(3).all() and table["reached"].tolist() == [3, 2, 1, 0] and table["of_clips"].eq(60).all()
    ends = table[["clips_median", "clips_least", "clips_most"]].astype(object)
    assert ends.where(ends.notna(), None).to_numpy().tolist() == [
        [20, 10, 30], [40, 10, None], [None, 20, None], [None, None, None]
    ]  # fmt: skip
    two = efficiency.reach_over_seeds(rows.groupby("method", sort=False).tail(2))  # between 40 and more than any number: no median
    assert two["clips_median"].tolist()[0] == 15 and two["clips_median"].isna().sum() == 3


def test_a_probe_looks_without_touching_the_training():
    config = DPOConfig(pairs=4, steps=5, batch_size=2, num_steps=2, learning_rate=1e-2, precision="float32")
    plain, probed = ToyGenerator(), ToyGenerator()
    before = dpo.train(plain, toy_reward, RECORDS, config, seed=3)
    clock, heard = efficiency.Clock(), []

    def watch(rollouts):
        heard.append(len(rollouts.rewards))
        return {"watch_exact": float(len(heard)), "watch_prompts": 2, "alarm": "exact"}

    settings = {"num_steps": 2, "guidance_scale": 1.0, "decode_iterations": 2, "precision": "float32"}
    settings |= {"steps": 5, "looks": 2, "group_size": 3, "seed": 1}
    probe = efficiency.Probe(probed, toy_reward, RECORDS[:2], clock, watch=watch, **settings)
    after = dpo.train(probed, toy_reward, RECORDS, config, seed=3, callback=probe)
    assert torch.equal(weights(plain.network), weights(probed.network))
    looks = [row["step"] for row in after if "probe_mean" in row]
    assert looks == [1, 3, 4] and heard == [6] * 4 and not any("alarm" in row or "probe_prompts" in row for row in after)
    assert probe.start["probe_exact"] == 1.0 and after[-1]["probe_exact"] == 4.0
    assert all(row[key] == value for row, old in zip(after, before, strict=True) for key, value in old.items())
    assert probe.start["probe_mean"] != after[1]["probe_mean"] != after[4]["probe_mean"] and len(clock.at) == 5


# ---------------------------------------------------------------------------------------- where the reward is fooled
def rows_of(system, rewards, counts):
    return pd.DataFrame(
        {"setting": "guidance 1", "system": system, "seed": 0, "id": [f"p{i}" for i in range(len(rewards))], "sample": 0,
         "noise_seed": range(len(rewards)), "prompt_text": [f"prompt {i}" for i in range(len(rewards))], "guidance": 1.0,
         "reward": rewards, "exact": 0.0, "tp": [c[0] for c in counts], "fp": [c[1] for c in counts],
         "fn": [c[2] for c in counts]}
    )  # fmt: skip


def test_between_methods_each_against_its_own_base():
    counts = [(1, 0, 1)] * 40
    levels = {"diffusion base": 0.0, "PPO": 0.3, "flow base": 0.5, "GRPO": 0.6, "DPO": 0.6}
    rng = np.random.default_rng(0)
    rows = pd.concat([rows_of(name, level + 0.01 * rng.standard_normal(40), counts) for name, level in levels.items()])
    table = efficiency.between(rows, ["reward", "event_f1"], n=500).set_index(["metric", "a", "b"])
    assert len(table) == 6 and not table.loc["event_f1"]["shown"].any()
    found = table.loc["reward"]
    assert found.loc["PPO", "GRPO"]["difference"] == pytest.approx(0.2, abs=0.01) and found.loc["PPO", "GRPO"]["shown"] == 1
    assert found.loc["GRPO", "DPO"]["difference_low"] < 0 < found.loc["GRPO", "DPO"]["difference_high"]
    assert (found["p_holm"] >= found["p"]).all()


def test_how_often_the_judge_fell_by_kind():
    table = pd.DataFrame({"kind": ["count", "count", "while", "while", "while"], "reward": [0.5, 0.05, 0.4, -0.3, -0.2],
                          "event_f1": [-0.1, -0.1, 0.2, -0.5, 0.1]})  # fmt: skip
    found = efficiency.fooled_by(table, "event_f1", least=0.1).set_index("kind")
    assert found["clips"].tolist() == [2, 3, 5] and found["rose"].tolist() == [1, 1, 2]
    assert found["fell_of_rose"].tolist() == [1, 0, 0.5] and found["fell_of_others"].tolist()[1:] == [0.5, 0.5]
    assert tuple(found.loc["all", ["fell_of_rose", "fell_of_rose_low", "fell_of_rose_high"]]) == tuple(stats.wilson(1, 2))
    assert len(efficiency.fooled(table, "event_f1", least=0.1)) == 1 and len(efficiency.fooled(table, "event_f1")) == 2
    assert efficiency.fooled_by(table.drop(columns="kind"), "event_f1")["kind"].tolist() == ["all"]


def test_changes_and_fooled_by_hand():
    base = rows_of("base", [0.1, 0.2, 0.3, 0.4], [(1, 0, 1), (2, 0, 0), (2, 0, 0), (0, 0, 2)])
    tuned = rows_of("PPO", [0.5, 0.5, 0.9, 0.3], [(2, 0, 0), (1, 0, 1), (1, 1, 1), (0, 0, 2)]).iloc[::-1]  # in another order
    table = efficiency.changes(pd.concat([tuned, base]), "PPO", "base", ["reward", "event_f1"]).set_index("id")
    assert table["reward"][["p0", "p1", "p2", "p3"]].tolist() == pytest.approx([0.4, 0.3, 0.6, -0.1])
    assert table["event_f1"][["p0", "p1", "p2", "p3"]].tolist() == pytest.approx([1 / 3, -1 / 3, -0.5, 0.0])
    assert table.loc["p2", ["reward_base", "reward_tuned", "event_f1_base", "event_f1_tuned"]].tolist() == [0.3, 0.9, 1.0, 0.5]
    assert efficiency.fooled(table.reset_index(), "event_f1")["id"].tolist() == ["p2", "p1"]
    found = efficiency.correlation(table.reset_index(), "event_f1", n=200)
    x, y = table["reward"], table["event_f1"]
    assert found["spearman"] == pytest.approx(x.corr(y, method="spearman")) and found["spearman_low"] <= found["spearman_high"]


def test_every_system_is_compared_with_its_own_base():
    rng = np.random.default_rng(0)
    scores = {name: rng.random(30) for name in ("diffusion base", "PPO", "flow base", "GRPO", "NFT")}
    rows = pd.concat([rows_of(name, values, [(1, 0, 0)] * 30) for name, values in scores.items()], ignore_index=True)
    bases = {"PPO": "diffusion base", "GRPO": "flow base", "NFT": "flow base", "DPO": "flow base"}  # DPO is not here
    table = efficiency.own_base_table(rows, bases, names=("reward",), n=500).set_index("system")
    assert table["base"].to_dict() == {"diffusion base": "", "PPO": "diffusion base", "flow base": "", "GRPO": "flow base",
                                       "NFT": "flow base"}  # fmt: skip
    p_values = []
    for system in ("PPO", "GRPO", "NFT"):
        alone = stats.paired_bootstrap(scores[system], scores[bases[system]], [f"p{i}" for i in range(30)], n=500)
        assert table.loc[system, ["reward_gain", "reward_gain_low", "reward_gain_high"]].tolist() == pytest.approx(list(alone))
        p_values.append(table.loc[system, "reward_p"])
    assert table.loc[["PPO", "GRPO", "NFT"], "reward_p_holm"].tolist() == pytest.approx(stats.holm(p_values).tolist())
    assert table.loc[["diffusion base", "flow base"], "reward_gain"].isna().all()
    one = report.headline_table(rows[rows["system"].isin(["flow base", "GRPO"])], base="flow base", names=("reward",), n=500)
    assert one["reward_gain"].iloc[1] == pytest.approx(table.loc["GRPO", "reward_gain"])


def test_the_methods_over_seeds_are_compared_on_all_rows(tmp_path):
    rng, pooled = np.random.default_rng(1), []
    for seed in (0, 1):
        systems = ("diffusion base", "PPO", "flow base", "GRPO", "NFT", "DPO")
        rows = [rows_of(name, rng.random(20), [(1, 0, 0)] * 20).assign(seed=seed, exact=1.0, order=np.nan) for name in systems]
        pooled.append(pd.concat(rows, ignore_index=True))
        write_table(tmp_path / f"seed{seed}" / "metrics", "ppo_rows", pooled[-1])
        write_table(tmp_path / f"seed{seed}" / "metrics", "ppo_table", efficiency.outcome(pooled[-1], clips=480, n=100)[0])
        reach = [{"method": name, "gain": 0.5, "reached": float(clips is not None), "clips": clips, "of_clips": 480}
                 for name, clips in (("PPO", 48), ("GRPO", None if seed else 48))]  # fmt: skip
        write_table(tmp_path / f"seed{seed}" / "metrics", "ppo_reach", reach)
        took = {"PPO 0.5": 20.0 + seed, "GRPO 0.5": None if seed else 9.5}
        record.write_json(tmp_path / f"seed{seed}" / "notes" / "08_clap_ppo.json", {"reach_s": took})
    versions.summarise(tmp_path)
    seeds._methods(tmp_path, 300)
    table = versions.read_table(tmp_path / "metrics" / "ppo_table.csv").set_index("system")
    both = pd.concat(pooled, ignore_index=True)
    by_hand = report.paired(both, "PPO", "diffusion base", metric="reward").mean
    assert table.loc["PPO", "reward_gain"] == pytest.approx(by_hand, abs=1e-6)  # tables have six digits
    assert table.loc["PPO", ["seeds", "clips", "clips_made"]].tolist() == [2, 40, 480] and table["reward_t_low"].notna().sum() == 4
    deviation = both.loc[both["system"] == "flow base", "reward"].std(ddof=0)
    assert table.loc["DPO", "reward_gain_deviations"] == pytest.approx(table.loc["DPO", "reward_gain"] / deviation, abs=1e-5)
    low = table["reward_gain_low"] / table["reward_gain"] * table["reward_gain_deviations"]
    assert table["reward_gain_deviations_low"]["DPO"] == pytest.approx(low["DPO"], abs=1e-4)
    text = (tmp_path / "metrics" / "ppo_table.md").read_text()
    assert "PPO" in text and "over" in text and f"{table.loc['PPO', 'reward_gain_deviations']:+.2f} [" in text
    assert (tmp_path / "figures" / "ppo_gains_reward.png").is_file()
    reach = versions.read_table(tmp_path / "metrics" / "ppo_reach.csv").set_index("method")
    assert reach["seeds"].tolist() == [2, 2] and reach["reached"].tolist() == [2, 1]
    assert reach["clips_least"].tolist() == [48, 48] and reach["clips_most"].isna().tolist() == [False, True]
    seconds = (tmp_path / "notes" / "ppo_reach_seconds.md").read_text()
    assert "| PPO | 0.5 | 2 | 2 | 20.500 | 20.000 | 21 |" in seconds and "| GRPO | 0.5 | 2 | 1 | – | 9.500 | – |" in seconds


@pytest.mark.parametrize("profile", ["smoke", "tiny", "small", "paper"])
def test_the_shipped_profiles_can_be_compared(profile):
    clips = efficiency.clips_made(resolve(PPOConfig, profile))
    for cls in (GRPOConfig, NFTConfig, DPOConfig):
        made = efficiency.at_clips(resolve(cls, profile), clips)
        assert efficiency.clips_made(made) == clips
