"""Trainings compared at equal numbers of generated clips: what such a number means for each method, what was learned by then
and how long it took, which method changed its clips more, and on which clips the reward rose while the judge's score fell.

Times never go into metrics (they differ between equal runs): curves hold them for figures, `runs.Run.record` for the record.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from resonate_lib import online, record, training
from resonate_lib.config import DPOConfig, GRPOConfig, NFTConfig, PPOConfig
from resonate_lib.evaluation import measures, report, stats, suite

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

    Online: groups stay as large, the number of rounds changes, and the prompts a round where it must, of two sizes as near the
    smaller, which makes more rounds. DPO: so many pairs, with
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
    chosen = min(sizes, key=lambda n: (abs(n - size), n))
    rounds = clips // (unit * chosen)
    if not dpo:
        return replace(config, steps=rounds, prompts_per_step=chosen)
    steps = rounds * config.fresh_every or max(config.steps, -(-chosen // config.batch_size))
    return replace(config, steps=steps, pairs=chosen)


# ---- learning against clips and seconds ------------------------------------------------------------


def clips_by(config: Trained, step: int) -> int:
    """How many clips a training has generated once its step or round (from 0) is done. DPO makes a set of pairs before the first
    step, and with fresh_every another one before every so manieth."""
    if isinstance(config, DPOConfig):
        return 2 * config.pairs * (step // config.fresh_every + 1 if config.fresh_every else 1)
    return (step + 1) * config.prompts_per_step * config.group_size


class Clock:
    """Callback of a training: how many seconds had passed, from its making on, when each round was done.

    state: the file that a resumed training goes on from; beside it the clock keeps its own times (`<state>.clock.json`). What a
    resumed training does again before its first round (DPO makes its pairs anew) does not count twice: that round counts as long as
    the mean of those before it.
    """

    def __init__(self, state=None):
        self.path = None if state is None else Path(f"{state}.clock.json")
        done = len(training.history_done(state) or ())
        known = json.loads(self.path.read_text()) if done and self.path.is_file() else []
        self.at, self.resumed = known[:done], bool(known[:done])
        self.out, self.began = 0.0, time.monotonic()

    def __call__(self, i: int, metrics: dict) -> None:
        passed = time.monotonic() - self.began - self.out
        if self.resumed:  # from here on the clock runs as if it had never stood
            self.out += passed - self.at[-1] * (1 + 1 / len(self.at))
            passed, self.resumed = self.at[-1] * (1 + 1 / len(self.at)), False
        self.at = [*self.at[:i], passed]
        if self.path is not None:
            record.atomic_write(self.path, json.dumps(self.at))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no time passes."""
        began = time.monotonic()
        yield
        self.out += time.monotonic() - began


class Unpaid:
    """A watch whose hearing takes no time of the clock, and is otherwise itself."""

    def __init__(self, watch, clock: Clock):
        self.watch, self.clock = watch, clock

    def __call__(self, rollouts):
        with self.clock.paused():
            return self.watch(rollouts)

    def __getattr__(self, name: str):
        return getattr(self.watch, name)


class Probe:
    """Callback of a training: now and then it lets the network make clips for a few fixed prompts from fixed noises, by the
    deterministic sampler, and adds what the reward (probe_mean, probe_std) and a watch (probe_<measure>) say of them to that step's
    metrics. Nothing is learned from these clips, and the `clock`, which it drives, stands still meanwhile.

    So all trainings are read alike, whatever they sample and however they explore. generator: the one that is trained; steps: how
    many its training has; start: what a probe of the untrained network says.
    """

    def __init__(self, generator, reward, records: Sequence[dict], clock: Clock, *, steps: int, seed: int = 0, looks: int = 10,
                 group_size: int = 2, watch: Callable | None = None, **settings):  # fmt: skip
        """settings: of `online.collect`, how clips are made (steps of the sampler as `num_steps`)."""
        settings["steps"] = settings.pop("num_steps")
        self.collect = lambda: online.collect(generator, generator.network, reward, list(records), group_size=group_size, seed=seed,
                                              **settings)  # fmt: skip
        self.watch, self.clock, self.steps = watch, clock, steps
        self.every = max(1, steps // looks)
        with clock.paused():
            self.start = self.look()

    def look(self) -> dict[str, float]:
        """The probe's numbers of the clips that the network makes now."""
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            rollouts = self.collect()
            told = {} if self.watch is None else self.watch(rollouts)
        found = {"probe_mean": rollouts.rewards.mean().item(), "probe_std": rollouts.rewards.std(correction=0).item()}
        told = {name.replace("watch_", "probe_"): value for name, value in told.items() if name not in ("alarm", "watch_prompts")}
        return found | told

    def __call__(self, i: int, metrics: dict) -> None:
        self.clock(i, metrics)
        if (i + 1) % self.every == 0 or i + 1 == self.steps:
            with self.clock.paused():
                metrics.update(self.look())


def learning_curve(history: Sequence[Mapping], config: Trained, seconds: Sequence[float], start: Mapping) -> list[dict]:
    """A row for the start (`Probe.start`) and for each look of the probe: `clips` generated and `seconds` passed by then, `gain` of
    the reward over the start in deviations of the clips at the start, and what the probe's watch noted.

    `clips_from` and `seconds_from`: of the first step after the look before. Whatever a look finds, it may have been so since then.
    """
    mean, deviation = start["probe_mean"], start["probe_std"] + 1e-8
    places = [i for i, row in enumerate(history) if "probe_mean" in row]
    spent = [{"clips": clips_by(config, row["step"]), "seconds": s} for row, s in zip(history, seconds, strict=True)]
    looks = [(history[i], spent[i], spent[before + 1]) for before, i in zip([-1, *places], places, strict=False)]
    nothing = {"clips": 0, "seconds": 0.0}
    return [{**here, **{f"{name}_from": value for name, value in since.items()}, "gain": (row["probe_mean"] - mean) / deviation}
            | {name: value for name, value in row.items() if name.startswith("probe_")}
            for row, here, since in [(start, nothing, nothing), *looks]]  # fmt: skip


def reached(curve: Sequence[Mapping], gain: float) -> Mapping | None:
    """The first row of a curve whose gain and the next one's (where there is one) are `gain` or more: one lucky look is not enough
    but at the end. None without one."""
    gains = [row["gain"] for row in curve]
    return next((row for row, here, then in zip(curve, gains, [*gains[1:], float("inf")], strict=True)
                 if here >= gain and then >= gain), None)  # fmt: skip


def fewest(reached_by: Mapping[str, Mapping | None], what: str) -> list[str]:
    """The methods that may have taken fewest `what` (clips, seconds), the likeliest first: who reached it first, and whoever may
    have reached it by then, since a look finds only that it was reached after the look before. reached_by: `reached` of each."""
    there = {name: row for name, row in reached_by.items() if row is not None}
    first = min((row[what] for row in there.values()), default=None)
    return sorted((name for name, row in there.items() if row[f"{what}_from"] <= first), key=lambda name: there[name][what])


def reach_over_seeds(rows: pd.DataFrame, value: str = "clips", by: Sequence[str] = ("method", "gain", "of_clips")) -> pd.DataFrame:
    """How much of `value` (clips, seconds) a gain takes over seeds: of each method and gain `seeds`, how many of them `reached` it,
    and the median, the least and the most of all seeds.

    rows: one for each seed, method and gain, `value` missing where the gain was not reached. Such a seed is censored: it takes more
    than any number, so the median is missing (not reached) where half of the seeds or more are such, the most where one is.
    """
    lines = []
    for key, part in rows.groupby(list(by), sort=False):
        taken = part[value].astype(float).fillna(np.inf)
        line = dict(zip(by, key, strict=True)) | {"seeds": len(taken), "reached": int(np.isfinite(taken).sum())}
        lines.append(line | {f"{value}_median": taken.median(), f"{value}_least": taken.min(), f"{value}_most": taken.max()})
    return pd.DataFrame(lines).replace(np.inf, np.nan)


# ---- where the reward is fooled ------------------------------------------------------------


def changes(rows: pd.DataFrame, tuned: str, base: str, names: Sequence[str]) -> pd.DataFrame:
    """What tuning changed, clip by clip: seed, id, kind, sample, noise_seed, prompt_text, and of each name its value with the base
    (`<name>_base`), with the tuned model (`<name>_tuned`) and the change (`<name>`).

    rows: of one setting (`ttabench.evaluate`); both systems had the same prompts and noise. event_f1 is that of the clip.
    """
    clip = [name for name in ("seed", "id", "kind", "sample", "noise_seed", "prompt_text") if name in rows]
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


def between(rows: pd.DataFrame, names: Sequence[str], *, n: int = 2000) -> pd.DataFrame:
    """Which of two methods changed its clips more, for every two of BASES in the rows and each metric of `names`.

    Columns: metric, a, b, difference of the mean change of a clip (a's over its own base less b's over its own) with _low and
    _high, p, p_holm (over all pairs of the metric), shown (1: a more, -1: b more, 0: nothing, see `report.Claim`). event_f1 is the
    clip's own, so its mean change is not that of the F1 over all clips. Paired by seed, prompt, sample and noise.
    """
    systems = [name for name, base in BASES.items() if {name, base} <= set(rows["system"])]
    lines = []
    for metric in names:
        its = {name: changes(rows, name, BASES[name], [metric]).set_index(["seed", "id", "sample"])[metric] for name in systems}
        found = {}
        for a, b in itertools.combinations(systems, 2):
            pair = pd.concat([its[a], its[b]], axis=1, keys=("a", "b"), join="inner").reset_index()
            ones = np.where(pair[["a", "b"]].notna().all(axis=1), 1.0, np.nan)
            found[a, b] = stats.compare(pair["a"], ones, pair["b"], ones, pair["id"], pair["seed"], n=n)
        for (a, b), claim in report.corrected(found).items():
            line = {"metric": metric, "a": a, "b": b, **claim.found.gain.columns("difference")}
            lines.append(line | {"p": claim.found.p, "p_holm": claim.p, "shown": claim.side})
    return pd.DataFrame(lines)


def fooled(table: pd.DataFrame, judged: str, *, reward: str = "reward", least: float = 0.0) -> pd.DataFrame:
    """Of `changes` the clips on which the reward rose by more than `least` and `judged` fell, the largest rise first."""
    return table[(table[reward] > least) & (table[judged] < 0)].sort_values(reward, ascending=False, kind="stable")


def fooled_by(table: pd.DataFrame, judged: str, *, by: str = "kind", reward: str = "reward", least: float = 0.0) -> pd.DataFrame:
    """How often `judged` fell where the reward rose by more than `least`, and where it fell by as much, for every value of the
    column `by` of `changes` (where there is one) and for all: clips, rose, fell_of_rose and fell_of_others with Wilson's 95 %
    intervals.

    Other weights move every clip, and the judge errs, so some fall by chance. A reward that the judge knows nothing of has the same
    share in both columns, a reward that means what the judge means a far smaller one in the first.
    """
    lines, parts = [], list(table.groupby(by, sort=False)) if by in table else []
    for value, part in [*parts, ("all", table)]:
        line = {by: value, "clips": len(part), "rose": int((part[reward] > least).sum())}
        for name, those in (("fell_of_rose", part[reward] > least), ("fell_of_others", part[reward] < -least)):
            line |= stats.wilson(int((part[judged][those] < 0).sum()), int(those.sum())).columns(name)
        lines.append(line)
    return pd.DataFrame(lines)


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
    """`own_base_table` of notebook 08's rows, of one seed or several, with `reward_gain_deviations` (and _low, _high), the reward's
    gain and its interval over the deviation of the own base's clips, and clips_made by each training; and the names of the metrics
    that the rows hold, the judge of what was asked first."""
    order = ("exact", "event_f1", "order", "reward", "ms_clap", "aqa", "clap", "PQ")
    names = [name for name in order if suite.measured(rows, name)]
    table = own_base_table(rows, BASES, names=names, n=n)
    spread = rows.groupby("system")["reward"].std(ddof=0)
    own = np.array([spread[base or system] for base, system in zip(table["base"], table["system"], strict=True)])
    for end in ("", "_low", "_high"):
        table[f"reward_gain_deviations{end}"] = table[f"reward_gain{end}"] / own
    table["clips_made"] = [clips if system in BASES else 0 for system in table["system"]]
    return table, names


def judge_of(names: Sequence[str]) -> str | None:
    """Of `outcome`'s metrics the one that judges what was asked clip by clip: event_f1, without a judge of events a second model's
    score, or PQ, which knows nothing of the prompt. None where only the reward has heard the clips."""
    return next((name for name in names if name not in ("exact", "order", "reward")), None)


def shown(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """`outcome`'s table as text for the eye: `report.readable` of the metrics `names`, what each system is compared with (`over`),
    and the reward's gain in deviations."""
    made = report.readable(table, names).drop(columns="setting")
    made.insert(1, "over", table["base"])
    columns = [table[f"reward_gain_deviations{end}"].astype(float) for end in ("", "_low", "_high")]
    texts = ["" if np.isnan(gain) else f"{gain:+.2f} [{low:+.2f}, {high:+.2f}]" for gain, low, high in zip(*columns, strict=True)]
    return made.assign(**{"reward gain in deviations": texts})
