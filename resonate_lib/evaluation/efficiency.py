"""Trainings compared at equal numbers of generated clips: what such a number means for each method, what was learned by then
and how long it took, and on which clips the reward rose while the judge's score fell.

Times never go into metrics (they differ between equal runs): curves hold them for figures, `runs.Run.record` for the record.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from resonate_lib import online, training
from resonate_lib.config import DPOConfig, GRPOConfig, NFTConfig, PPOConfig
from resonate_lib.evaluation import measures, metrics, report, suite

Trained = DPOConfig | GRPOConfig | NFTConfig | PPOConfig
BASES = {"PPO": "diffusion base", "GRPO": "flow base", "NFT": "flow base", "DPO": "flow base"}  # what each was tuned from

# ---- equal numbers of clips ------------------------------------------------------------


def clips_made(config: Trained) -> int:
    """How many clips a training by this configuration generates and learns from."""
    if isinstance(config, DPOConfig):
        return 2 * config.pairs * config.rounds
    return config.steps * config.prompts_per_step * config.group_size


def at_clips(config: Trained, clips: int) -> Trained:
    """The same training with exactly `clips` generated clips, in rounds as near in size to its own as can be.

    Online: groups stay as large, the number of rounds changes, and the prompts a round where it must. DPO: so many pairs, with
    fresh_every in rounds, each with the same number of optimizer steps; of one set of pairs it takes at least as many steps as see
    each pair once. ValueError where no round of half to twice the size divides the clips.
    """
    dpo = isinstance(config, DPOConfig)
    unit, size = (2, config.pairs) if dpo else (config.group_size, config.prompts_per_step)
    if dpo and not config.fresh_every:
        size = clips // unit
    sizes = [n for n in range(-(-size // 2), 2 * size + 1) if n and clips % (unit * n) == 0]
    if not sizes:
        what = "pairs" if dpo else f"prompts x {unit} clips"
        raise ValueError(
            f"{clips} clips cannot be made in equal rounds of {-(-size // 2)} to {2 * size} {what}: use other steps, "
            "prompts_per_step or group_size"
        )
    chosen = min(sizes, key=lambda n: (abs(n - size), -n))
    rounds = clips // (unit * chosen)
    if not dpo:
        return replace(config, steps=rounds, prompts_per_step=chosen)
    steps = rounds * config.fresh_every or max(config.steps, -(-chosen // config.batch_size))
    return replace(config, steps=steps, pairs=chosen)


# ---- learning against clips and seconds ------------------------------------------------------------


class Clock:
    """Callback of a training: how many seconds had passed, from its making on, when each round was done.

    state: the file that a resumed training goes on from; what its rounds took before counts, shared evenly among them.
    """

    def __init__(self, state=None):
        self.before, self.out, self.began = training.seconds_done(state), 0.0, time.monotonic()
        self.at: dict[int, float] = {}

    def __call__(self, i: int, metrics: dict) -> None:
        self.at[i] = self.before + time.monotonic() - self.began - self.out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no time passes."""
        began = time.monotonic()
        yield
        self.out += time.monotonic() - began

    def seconds(self, rounds: int) -> list[float]:
        """After each of so many rounds."""
        first = min(self.at, default=rounds)
        return [self.at[i] if i in self.at else self.before * (i + 1) / first for i in range(rounds)]


class Probe:
    """Callback of a training whose steps make no clips (DPO): now and then it lets the network make some, for a few fixed prompts
    and noises, and adds what the reward and a watch say of them to that step's metrics. Nothing is learned from these clips.

    start: the same of the untrained network. The `clock` stands still meanwhile, and counts the steps.
    """

    def __init__(self, generator, reward, records: Sequence[dict], config: DPOConfig, clock: Clock, *, seed: int = 0,
                 looks: int = 8, group_size: int = 4, watch: Callable | None = None):  # fmt: skip
        self.collect = lambda: online.collect(
            generator, generator.network, reward, list(records), group_size=group_size, steps=config.num_steps,
            guidance_scale=config.guidance_scale, seed=seed, decode_iterations=config.decode_iterations,
            precision=config.precision, sample_batch=config.sample_batch, unnormalise=config.unnormalise,
        )  # fmt: skip
        self.watch, self.clock, self.steps = watch, clock, config.steps
        self.every = max(1, config.steps // looks)
        with clock.paused():
            self.start = self.look()

    def look(self) -> dict[str, float]:
        """`online.reward_metrics` and the watch's measures of the clips that the network makes now."""
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            rollouts = self.collect()
            told = {} if self.watch is None else self.watch(rollouts)
        # an alarm compares rounds of one training from its start, which a resumed one no longer has
        return online.reward_metrics(rollouts) | {name: value for name, value in told.items() if name != "alarm"}

    def __call__(self, i: int, metrics: dict) -> None:
        self.clock(i, metrics)
        if (i + 1) % self.every == 0 or i + 1 == self.steps:
            with self.clock.paused():
                metrics.update(self.look())


def learning_curve(
    history: Sequence[Mapping], config: Trained, seconds: Sequence[float], *, start: Mapping | None = None
) -> list[dict]:
    """Rows of `clips` generated, `seconds` passed and `gain` of the reward (`online.gains`), and of what a watch noted.

    Of an online training a row a round. Of DPO (start: `Probe.start`) the start at 0 clips, then a row for each look at all of its
    clips, since they are made before anything is learned, and a gain in deviations of the clips at the start.
    """
    if start is None:
        turns = len(config.guidance_scales)
        rows = online.gains(list(history), config.prompts_per_step * config.group_size, turns=turns)
        return [row | {"seconds": s} | _watched(line) for row, line, s in zip(rows, history, seconds, strict=True)]
    looks = [(line, clips_made(config), s) for line, s in zip(history, seconds, strict=True) if "reward_mean" in line]
    mean, deviation = start["reward_mean"], start["reward_std"] + 1e-8
    return [{"clips": clips, "gain": (line["reward_mean"] - mean) / deviation, "seconds": s} | _watched(line)
            for line, clips, s in [(start, 0, 0.0), *looks]]  # fmt: skip


def _watched(line: Mapping) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("watch_")}


def reached(curve: Sequence[Mapping], *, gain: float = 1.0, smooth: int = 1) -> Mapping | None:
    """The first row of a curve at which the mean gain of the last `smooth` rows, no fewer, is `gain` or more; None without one."""
    means = pd.Series([row["gain"] for row in curve]).rolling(smooth, min_periods=smooth).mean()
    found = np.flatnonzero(means >= gain)
    return curve[found[0]] if len(found) else None


# ---- where the reward is fooled ------------------------------------------------------------


def changes(rows: pd.DataFrame, tuned: str, base: str, names: Sequence[str]) -> pd.DataFrame:
    """What tuning changed, clip by clip: seed, id, sample, noise_seed, prompt_text, and of each name its value with the base
    (`<name>_base`), with the tuned model (`<name>_tuned`) and the change (`<name>`).

    rows: of one setting (`ttabench.evaluate`); both systems had the same prompts and noise. event_f1 is that of the clip.
    """
    clip = ["seed", "id", "sample", "noise_seed", "prompt_text"]
    sides = []
    for system in (base, tuned):
        side = rows[rows["system"] == system]
        if "event_f1" in names:
            side = side.assign(event_f1=2 * side["tp"] / (2 * side["tp"] + side["fp"] + side["fn"]))
        sides.append(side.set_index(clip)[list(names)].astype(float))
    table = sides[0].join(sides[1], how="inner", lsuffix="_base", rsuffix="_tuned", validate="one_to_one")
    for name in names:
        table[name] = table[f"{name}_tuned"] - table[f"{name}_base"]
    return table.reset_index()


def fooled(table: pd.DataFrame, judged: str, *, reward: str = "reward") -> pd.DataFrame:
    """Of `changes` the clips on which the reward rose and `judged` fell, the largest rise of the reward first."""
    return table[(table[reward] > 0) & (table[judged] < 0)].sort_values(reward, ascending=False, kind="stable")


def correlation(table: pd.DataFrame, judged: str, *, reward: str = "reward", n: int = 2000) -> dict[str, float]:
    """Spearman's rank correlation of both changes of `changes` with its 95 % interval over prompts: spearman, _low, _high."""
    known = table[table[[reward, judged]].notna().all(axis=1)]
    return measures.over_clips({"spearman": measures.spearman_of(known[reward], known[judged])}, known["id"], n=n)


def own_base_table(rows: pd.DataFrame, bases: Mapping[str, str], *, names: Sequence[str], n: int = 2000) -> pd.DataFrame:
    """`report.headline_table` in which every system is compared with its own base, which the column `base` names ("" of a base).

    bases: system -> base. Holm's correction is over all gains of a metric, whatever their base.
    """
    table = report.headline_table(rows, base=bases, names=names, n=n)
    table.insert(2, "base", [bases.get(system, "") for system in table["system"]])
    return table


def outcome(rows: pd.DataFrame, *, clips: int, n: int = 2000) -> tuple[pd.DataFrame, list[str]]:
    """`own_base_table` of notebook 08's rows, of one seed or several, with `reward_gain_deviations`, the reward's gain over the
    deviation of the own base's clips, and clips_made by each training; and the names of the metrics that the rows hold."""
    names = [name for name in (*metrics.HEADLINE, "PQ") if suite.measured(rows, name)]
    table = own_base_table(rows, BASES, names=names, n=n)
    spread = rows.groupby("system")["reward"].std(ddof=0)
    gains = zip(table["reward_gain"], table["base"], table["system"], strict=True)
    table["reward_gain_deviations"] = [gain / spread[base or system] for gain, base, system in gains]
    table["clips_made"] = [clips if system in BASES else 0 for system in table["system"]]
    return table, names
