"""The watch: during a training it hears what the reward hears with other ears, and tells when the two part.

Every few rounds it takes some of the clips that the round made anyway (training prompts; nothing is generated for it) and
notes the independent judge, aesthetics, loudness and diversity beside the reward. The alarm compares the last few of its
rounds with the first few:

    change_m = mean of measure m in the last window - in the first,   t_m = change_m / standard error (Welch; prompts are
    the units, because clips of one prompt are alike)

The alarm is raised where the reward has risen, t_reward above Student's quantile at 1 - LEVEL, and a measure has gone where no
better model would take it, at LEVEL / (looks x measures): a score has fallen, loudness has moved by more than LOUDER, or diversity
has fallen under ALIKE of what it was. A training is looked at several times and in several respects, so without that division
(Bonferroni) some measure would seem to fall sooner or later in any. A sound training thus raises an alarm with probability LEVEL
at most. The rise of the reward needs no division: it is asked besides, and alone raises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import special

from resonate_lib import online
from resonate_lib.config import RewardConfig, resolve
from resonate_lib.evaluation import ttabench, worlds
from resonate_lib.models.codec import mel_basis

LEVEL = 0.05  # probability of an alarm in a whole training where no measure has parted, at most
LOUDER = 3.0  # dB: twice the power, or half
ALIKE = 0.5
LONGEST = 8  # watches in a window
FEWEST = 3  # prompts a watch hears; of fewer the scatter is not known, and nothing parts
SIBLINGS = 4  # clips a prompt that are heard: prompts differ more than siblings do
SILENCE = -70.0  # LUFS of a clip without any: the gate below which BS.1770 hears nothing
SCORES = ("exact", "event_f1", "aqa", "ms_clap", "clap", "CE", "CU", "PQ")  # higher is better
NOTED = (*SCORES, "PC", "loudness", "diversity")  # of production complexity neither end is better: no alarm
BANDS, PARTS, FLOOR_DB = 32, 8, -60.0  # of the picture of a clip that diversity compares


class Watch:
    """Called with a watched round's `online.Rollouts`, it returns what goes into the history: for the reward and every measure
    `watch_<name>`, the mean over the round's prompts, and `watch_<name>_se`, its standard error; watch_prompts; and `alarm`, the
    measures that have parted from the reward ("" where none has).

    exact, event_f1 (here the mean over clips): the judge's; CE, CU, PC, PQ: aesthetics; loudness in LUFS; diversity: `diversity`
    in dB. It remembers its rounds, so each training needs a watch of its own.
    """

    def __init__(self, scorers: Mapping[str, object], *, watches: int, siblings: int = SIBLINGS):
        """scorers: as for `ttabench.evaluate`. watches: how many rounds of the training it will hear; siblings: clips a prompt."""
        self.scorers, self.watches, self.siblings = dict(scorers), watches, siblings
        self.rows: list[dict] = []

    def __call__(self, rollouts: online.Rollouts) -> dict[str, float | str]:
        ids = rollouts.group_ids.numpy()
        place = pd.Series(ids).groupby(ids).cumcount().to_numpy()  # 0 for the first clip of a prompt
        heard = np.flatnonzero(place < self.siblings)
        measures = self._hear(rollouts, heard)
        row: dict[str, float | str] = {"watch_prompts": rollouts.groups}
        row |= _mean_and_error("reward", by_prompt(rollouts.rewards.numpy(), ids))
        for name, values in measures.items():
            row |= _mean_and_error(name, by_prompt(values, ids[heard]))
        row |= _mean_and_error("diversity", diversity(rollouts.audio[np.flatnonzero(place == 0)], rollouts.sample_rate))
        self.rows.append(row)
        row["alarm"] = ", ".join(parted(self.rows, self.watches))
        return dict(row)

    def _hear(self, rollouts, heard) -> dict[str, np.ndarray]:
        """What the scorers say of the clips `heard`, and their loudness: name -> (clips,)."""
        records = [{"id": rollouts.prompts[i]} | rollouts.metadata[i] for i in heard]  # training prompts need not have one
        rows = ttabench.score_clips(rollouts.audio[heard], records, self.scorers, sample_rate=rollouts.sample_rate)
        if "judge" in self.scorers:
            rows["event_f1"] = 2 * rows["tp"] / (2 * rows["tp"] + rows["fp"] + rows["fn"])
        rows["loudness"] = rows["loudness"].fillna(SILENCE)
        return {name: rows[name].to_numpy(float) for name in NOTED if name in rows and rows[name].notna().all()}

    def state_dict(self) -> dict:
        """The rounds heard so far, for a training's state."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        """Go on from the rounds of `state_dict`."""
        self.rows = list(state["rows"])


def open_watch(world, run, config) -> Watch | None:
    """The watch over one training by a GRPOConfig, NFTConfig or DiffROConfig; None where its watch_every is 0.

    Ears: the world's judge, else MS-CLAP, a second CLAP and a second audio language model where their sources are set, the last
    only from a server (beside a training there is no room for it); aesthetics where its source is set.
    """
    rounds = online.watched_rounds(config)
    if not rounds:
        return None
    ears = world.judge(run)
    if not ears:
        served = resolve(RewardConfig, run.profile).lalm_eval_source.startswith("http")
        ears = {"ms_clap": run.ms_clap(), "clap": worlds.second(run, "clap"), "aqa": worlds.second(run, "lalm") if served else None}
    ears |= {"aesthetics": run.aesthetics()}
    return Watch({name: ear for name, ear in ears.items() if ear is not None}, watches=len(rounds))


# ---- what is measured ------------------------------------------------------------


def by_prompt(values, group_ids) -> np.ndarray:
    """Means of `values` (n,) over the clips of each prompt: (prompts,)."""
    return pd.Series(np.asarray(values, float)).groupby(np.asarray(group_ids)).mean().to_numpy()


def diversity(audio: torch.Tensor, sample_rate: int) -> np.ndarray:
    """How far clips (G, T) of different prompts lie apart, in dB: one value a clip (G,), whose mean is the mean over all pairs.

    A clip is a picture of BANDS mel bands by PARTS equal stretches of time, in dB under its own peak, FLOOR_DB at least; two
    clips' distance is the root mean square difference of their pictures. No model takes part, and no level. Unlike
    `metrics.diversity` it does not compare clips of one prompt: in GRPO with a window those share their noise by design. The
    values are 2·(mean distance to the others) - mean over all pairs, whose scatter is that of the mean over pairs (Hoeffding's
    projection of a U-statistic). nan for one clip.
    """
    length = round(0.05 * sample_rate)
    audio = torch.nn.functional.pad(audio.float(), (0, max(0, length - audio.shape[-1])))
    spectrum = torch.stft(audio, length, window=torch.hann_window(length), center=False, return_complex=True).abs().square()
    power = torch.nn.functional.adaptive_avg_pool1d(mel_basis(sample_rate, length, BANDS) @ spectrum, PARTS).flatten(1)
    peak = power.amax(1, keepdim=True).clamp(min=1e-12)
    pictures = 10 * torch.log10((power / peak).clamp(min=10 ** (FLOOR_DB / 10)))
    distances = torch.cdist(pictures, pictures, compute_mode="donot_use_mm_for_euclid_dist").double().numpy()
    distances /= np.sqrt(pictures.shape[1])
    others = distances.sum(1) / (len(audio) - 1) if len(audio) > 1 else np.full(1, np.nan)
    return 2 * others - others.mean()


def _mean_and_error(name: str, values: np.ndarray) -> dict[str, float]:
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return {f"watch_{name}": float(values.mean()), f"watch_{name}_se": float(error)}


# ---- the alarm ------------------------------------------------------------


def window(watches: int) -> int:
    """Watches that are compared with as many first ones: a third of all, LONGEST at most."""
    return max(1, min(LONGEST, watches // 3))


def welch(last: Sequence[Mapping], first: Sequence[Mapping], name: str, *, share: float = 1.0) -> tuple[float, float, float]:
    """(mean of `name` in the rows `last` - share · that in the rows `first`, its standard error, degrees of freedom).

    The variances of single watches add up, and Welch and Satterthwaite's formula counts the degrees of freedom.
    """
    change, variances, freedoms = 0.0, [], []
    for rows, weight in ((last, 1.0), (first, -share)):
        change += weight * sum(row[f"watch_{name}"] for row in rows) / len(rows)
        variances += [(weight * row[f"watch_{name}_se"] / len(rows)) ** 2 for row in rows]
        freedoms += [row["watch_prompts"] - 1 for row in rows]
    total = sum(variances)
    below = sum(variance**2 / max(freedom, 1) for variance, freedom in zip(variances, freedoms, strict=True))
    return change, total**0.5, total**2 / below if below else 1.0


def parted(rows: Sequence[Mapping], watches: int, *, level: float = LEVEL) -> list[str]:
    """The measures that have parted from the reward at the last of `rows`, which are all watches so far of `watches` planned."""
    width = window(watches)
    looks = watches - 2 * width + 1
    if len(rows) < 2 * width or min(row["watch_prompts"] for row in rows) < FEWEST:
        return []
    first, last = rows[:width], rows[-width:]
    if not _above(*welch(last, first, "reward"), level):
        return []
    judged = [name for name in (*SCORES, "loudness", "diversity") if all(f"watch_{name}" in row for row in (*first, *last))]
    return [name for name in judged if _has_gone(name, last, first, level / (looks * len(judged)))]


def _has_gone(name: str, last, first, level: float) -> bool:
    change, error, freedom = welch(last, first, name, share=ALIKE if name == "diversity" else 1.0)
    if name == "loudness":
        return _above(abs(change) - LOUDER, error, freedom, level)
    return _above(-change, error, freedom, level)


def _above(change: float, error: float, freedom: float, level: float) -> bool:
    return bool(change > special.stdtrit(freedom, 1 - level) * error)


# ---- reading a history ------------------------------------------------------------


def first_alarm(history: Sequence[Mapping]) -> tuple[int, str] | None:
    """(step, what had parted) of the first alarm in a training's history; None where there was none."""
    return next(((row["step"], row["alarm"]) for row in history if isinstance(row.get("alarm"), str) and row["alarm"]), None)


def said(history: Sequence[Mapping]) -> str:
    """The first alarm of a history in words, "none", "too short to tell" or "not watched"."""
    rows = [row for row in history if pd.notna(row.get("watch_reward"))]
    if not rows:
        return "not watched"
    if len(rows) < 2 or min(row["watch_prompts"] for row in rows) < FEWEST:
        return "too short to tell"
    alarm = first_alarm(history)
    return f"{alarm[1]}, in round {alarm[0] + 1}" if alarm else "none"


def changes(history: Sequence[Mapping]) -> pd.DataFrame:
    """The watched rounds of a history, one row for each and every measure: step, measure, change, low, high.

    change: less the mean of the first window, in deviations between prompts in that window, so that all fit one axis; low and
    high: the 95 % interval of the round's own mean. No rows where nothing was watched.
    """
    rows = [row for row in history if pd.notna(row.get("watch_reward"))]
    first, lines = rows[: window(len(rows))], []
    for name in [name for name in ("reward", *NOTED) if rows and all(f"watch_{name}" in row for row in rows)]:
        start = np.mean([row[f"watch_{name}"] for row in first])
        spread = np.sqrt(np.mean([row["watch_prompts"] * row[f"watch_{name}_se"] ** 2 for row in first])) or 1.0
        for row in rows:
            half = special.stdtrit(max(row["watch_prompts"] - 1, 1), 0.975) * row[f"watch_{name}_se"] / spread
            change = (row[f"watch_{name}"] - start) / spread
            lines.append((row["step"], name, change, change - half, change + half))
    return pd.DataFrame(lines, columns=["step", "measure", "change", "low", "high"])
