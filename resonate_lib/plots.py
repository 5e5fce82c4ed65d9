"""Every figure of the notebooks: one function each, given data, giving a matplotlib Figure.

No figure computes a metric; the numbers come from `evaluation`. One style, colours told apart by colour-blind readers
(Okabe-Ito; cividis and magma for images), units in every label. A returned figure is closed for pyplot, so a notebook
shows it once.
"""

from __future__ import annotations

import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resonate_lib import audio as audio_io

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#7F7F7F")
SYSTEMS = {  # one colour for a system in every figure
    name: COLORS[place]
    for place, name in enumerate(("base", "base trained on", "DPO", "GRPO (CLAP)", "GRPO (LALM)", "NFT", "best of", "originals"))
} | {"GRPO (LALM, fine)": "#332288", "GRPO (NFT's reward)": "#999933", "DiffRO": "#882255"}
MARKERS = "osD^vPX*"
STYLE = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": plt.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}
FLOOR_DB = -80.0


def _axes(rows: int = 1, columns: int = 1, size=(7.0, 3.2), **options) -> tuple[Figure, np.ndarray]:
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    plt.close(figure)
    return figure, axes


def _color(name, index: int) -> str:
    """The colour of a system ("best of 4", "originals through the codec" by how they begin), else the one of this place."""
    exact = SYSTEMS.get(name)
    return exact or next((c for known, c in SYSTEMS.items() if str(name).startswith(known)), COLORS[index % len(COLORS)])


def _numpy(values) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values, float)


def save(figure: Figure, path) -> None:
    """Write a figure as PNG, whole or not at all, without a date inside: the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    audio_io.write_bytes(path, buffer.getvalue())


# ---- sound ------------------------------------------------------------


def spectrogram_db(waveform, sample_rate: int) -> np.ndarray:
    """Spectrogram of one clip (T,) in dB re a full-scale sine: (512 bins up to half the rate, frames of 16 ms)."""
    waveform = torch.as_tensor(_numpy(waveform), dtype=torch.float32)
    hop = max(1, round(0.016 * sample_rate))
    window = torch.hann_window(1024)
    if waveform.numel() < 1024:
        waveform = torch.nn.functional.pad(waveform, (0, 1024 - waveform.numel()))
    spectrum = torch.stft(waveform, 1024, hop, window=window, return_complex=True)[:512].abs()
    return (20 * torch.log10(spectrum * 2 / window.sum() + 1e-10)).numpy()


def spectrogram(
    waveform,
    sample_rate: int,
    ax: Axes | None = None,
    *,
    top_db: float | None = None,
    title: str = "",
    colorbar: bool = True,
) -> Figure:
    """Spectrogram of one clip (T,), 80 dB down from `top_db` (dBFS; default this clip's highest), drawn into `ax`."""
    figure, ax = (ax.figure, ax) if ax is not None else ((made := _axes(size=(6, 2.6)))[0], made[1][0, 0])
    values = spectrogram_db(waveform, sample_rate)
    top = float(values.max()) if top_db is None else top_db
    seconds = len(_numpy(waveform)) / sample_rate
    image = ax.imshow(
        values,
        origin="lower",
        aspect="auto",
        extent=(0, seconds, 0, sample_rate / 2000),
        cmap="magma",
        vmin=top + FLOOR_DB,
        vmax=top,
    )
    ax.grid(False)
    ax.set(xlabel="time (s)", ylabel="frequency (kHz)", title=title)
    if colorbar:
        figure.colorbar(image, ax=ax, label="level (dBFS)")
    return figure


def spectrogram_row(clips: Mapping[str, object], sample_rate: int, *, title: str = "") -> Figure:
    """Spectrograms of several clips side by side on one dB scale; clips: label -> waveform (T,)."""
    top = max(float(spectrogram_db(clip, sample_rate).max()) for clip in clips.values())
    figure, axes = _axes(1, len(clips), size=(3.2 * len(clips) + 0.8, 2.8), sharey=True)
    for ax, (label, clip) in zip(axes[0], clips.items(), strict=True):
        spectrogram(clip, sample_rate, ax, top_db=top, title=_wrap(label, 24), colorbar=ax is axes[0, -1])
        ax.label_outer()
    figure.suptitle(_wrap(title, 120), fontsize=10)
    return figure


def scene_timeline(record: Mapping, waveform, sample_rate: int) -> Figure:
    """A scene's events as bars over time (with their level) above its spectrogram; record: a manifest record."""
    figure, axes = _axes(2, 1, size=(7, 4.4), sharex=True, height_ratios=(1, 2))
    names = list(dict.fromkeys(event["name"] for event in record["events"]))
    for event in record["events"]:
        row = names.index(event["name"])
        length = event["offset"] - event["onset"]
        axes[0, 0].barh(row, length, left=event["onset"], color=COLORS[row % len(COLORS)], height=0.6)
        axes[0, 0].text(event["onset"], row + 0.36, f"{event['level_db']:.0f} dB", fontsize=7, va="bottom")
    axes[0, 0].set(yticks=range(len(names)), yticklabels=[name.replace("_", " ") for name in names])
    axes[0, 0].set_ylim(-0.5, len(names) - 0.2)
    axes[0, 0].set_title(_wrap(record["caption"], 90))
    spectrogram(waveform, sample_rate, axes[1, 0])
    return figure


# ---- corpus ------------------------------------------------------------


def corpus_statistics(records: Sequence[Mapping]) -> Figure:
    """What a corpus holds: clips per event, kinds of scenes, event lengths and levels. records: manifest records."""
    figure, axes = _axes(2, 2, size=(9, 6))
    per_event = Counter(name for record in records for name in {name for name, _ in record["groups"]})
    names = sorted(per_event, key=per_event.get)
    axes[0, 0].barh([name.replace("_", " ") for name in names], [per_event[name] for name in names], color=COLORS[0])
    axes[0, 0].set(xlabel="clips that hold the event", title=f"{len(records)} clips, {len(names)} events")
    axes[0, 0].tick_params(axis="y", labelsize=7)
    kinds = Counter(record["kind"] for record in records)
    axes[0, 1].bar(list(kinds), list(kinds.values()), color=COLORS[1])
    axes[0, 1].set(ylabel="clips", title="kind of scene")
    events = [event for record in records for event in record["events"]]
    axes[1, 0].hist([event["offset"] - event["onset"] for event in events], bins=30, color=COLORS[2])
    axes[1, 0].set(xlabel="length of an occurrence (s)", ylabel="occurrences")
    axes[1, 1].hist([event["level_db"] for event in events], bins=30, color=COLORS[3])
    axes[1, 1].set(xlabel="level of an occurrence (dB)", ylabel="occurrences")
    return figure


# ---- training ------------------------------------------------------------


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over the last `width` values at every step; nan values are left out."""
    return pd.Series(values).rolling(width, min_periods=1).mean().to_numpy()


def _curve(ax: Axes, history: Sequence[Mapping], key: str, smooth: int, index: int, label: str) -> None:
    steps = [line.get("step", i) for i, line in enumerate(history) if key in line]
    values = np.array([float(line[key]) for line in history if key in line])
    color = COLORS[index % len(COLORS)]
    if len(steps) > 1:
        smooth = max(1, round(smooth / max(1.0, float(np.median(np.diff(steps))))))
    if smooth > 1:
        ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(steps, _smooth(values, smooth), color=color, label=label, linewidth=1.5)


def training_curves(
    history: Sequence[Mapping], keys: Sequence[str], *, smooth: int = 1, units: Mapping[str, str] = {}
) -> Figure:
    """One panel per key over the training steps; history: dicts of numbers with "step".

    smooth: steps of a running mean. units: key -> unit for its label. Raises ValueError for a key that no entry has.
    """
    known = {key for line in history for key in line}
    if missing := [key for key in keys if key not in known]:
        raise ValueError(f"keys {missing}: the history has {sorted(known)}; choose among them")
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = _axes(rows, columns, size=(3.4 * columns + 0.4, 2.5 * rows))
    for index, (ax, key) in enumerate(zip(axes.flat, keys, strict=False)):
        _curve(ax, history, key, smooth, index, key)
        unit = units.get(key, "")
        ax.set(xlabel="step", ylabel=f"{key.replace('_', ' ')} ({unit})" if unit else key.replace("_", " "))
    for ax in axes.flat[len(keys) :]:
        ax.set_visible(False)
    return figure


def reward_curves(
    histories: Mapping[str, Sequence[Mapping]],
    *,
    key: str = "reward",
    smooth: int = 5,
    x: str = "step",
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
) -> Figure:
    """One curve per label over steps (or over another number each entry has, such as clips generated); faint: raw."""
    figure, axes = _axes(size=(7, 3.4))
    for index, (label, history) in enumerate(histories.items()):
        lines = [{**line, "step": line.get(x, i)} for i, line in enumerate(history)]
        _curve(axes[0, 0], lines, key, smooth, index, label)
    axes[0, 0].set(xlabel=xlabel or x, ylabel=ylabel or key.replace("_", " "), title=title)
    axes[0, 0].legend()
    return figure


def watch_curves(table: pd.DataFrame, alarm: tuple[int, str] | None = None, *, title: str = "") -> Figure:
    """The reward and what was watched beside it, on one axis, and an upright line at the first alarm.

    table: from `watch.changes`. alarm: (step, what had parted), from `watch.first_alarm`.
    """
    figure, axes = _axes(size=(7.5, 3.4))
    ax = axes[0, 0]
    for index, (name, part) in enumerate(table.groupby("measure", sort=False)):
        color, width = ("black", 2.2) if name == "reward" else (COLORS[(index - 1) % len(COLORS)], 1.4)
        label = str(name).replace("_", " ")
        ax.plot(part["step"], part["change"], marker=MARKERS[index % len(MARKERS)], color=color, linewidth=width, label=label)
        ax.fill_between(part["step"], part["low"], part["high"], color=color, alpha=0.1, linewidth=0)
    ax.axhline(0, color="black", linewidth=0.6)
    if alarm is not None:
        ax.axvline(alarm[0], color=COLORS[5], linestyle="--", linewidth=1.8)
        text = _wrap(f"alarm: {alarm[1].replace('_', ' ')}", 24)
        ax.annotate(text, (alarm[0], 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0), textcoords="offset points",
                    ha="right", fontsize=8, color=COLORS[5])  # fmt: skip
    ax.set(xlabel="step", ylabel="change since the first rounds\n(deviations between prompts)", title=title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def ode_vs_sde(times, ode, sde, *, place: tuple[int, int] = (0, 0)) -> Figure:
    """One latent number on its way from noise (t=1) to data (t=0), by a deterministic and by a stochastic sampler.

    times (S+1,); ode, sde: paths (B, S+1), or latents (B, S+1, N, C) of which `place` = (frame, channel) is drawn.
    """
    times = _numpy(times)
    figure, axes = _axes(1, 2, size=(8, 3.2), sharey=True)
    for ax, paths, title in zip(
        axes[0], (ode, sde), ("ODE: the noise fixes the sample", "SDE: noise at every step but the last"), strict=True
    ):
        values = _numpy(paths)
        values = values[:, :, place[0], place[1]] if values.ndim == 4 else values
        for index, path in enumerate(values):
            ax.plot(times, path, marker=".", markersize=3, linewidth=1, color=COLORS[index % len(COLORS)])
        ax.set(xlabel="t (1 noise, 0 audio latent)", title=title)
        ax.invert_xaxis()
    axes[0, 0].set_ylabel("latent value (normalised)")
    return figure


def pairs_histogram(winners, losers, *, name: str = "reward") -> Figure:
    """Preference pairs: rewards of winners and losers, and the margin between them; both (pairs,)."""
    winners, losers = _numpy(winners), _numpy(losers)
    figure, axes = _axes(1, 2, size=(8, 3))
    edges = np.histogram_bin_edges(np.concatenate([winners, losers]), bins=30)
    axes[0, 0].hist(winners, edges, color=COLORS[0], alpha=0.7, label="winner")
    axes[0, 0].hist(losers, edges, color=COLORS[1], alpha=0.7, label="loser", hatch="//")
    axes[0, 0].set(xlabel=name, ylabel="clips", title=f"{len(winners)} pairs")
    axes[0, 0].legend()
    axes[0, 1].hist(winners - losers, bins=30, color=COLORS[2])
    axes[0, 1].set(xlabel=f"margin of {name}", ylabel="pairs", title=f"median margin {np.median(winners - losers):.3f}")
    return figure


# ---- evaluation ------------------------------------------------------------


def score_histogram(scores: Mapping[str, object], *, xlabel: str = "score", title: str = "") -> Figure:
    """Distributions of a score as outlines; scores: label (true captions, a kind of negative) -> values (M,)."""
    figure, axes = _axes(size=(7, 3.2))
    values = {label: _numpy(v)[np.isfinite(_numpy(v))] for label, v in scores.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=40)
    for index, (label, v) in enumerate(values.items()):
        style = ("-", "--", ":", "-.")[index % 4]
        weights = np.full(len(v), 1 / max(len(v), 1))
        axes[0, 0].hist(
            v, edges, weights=weights, histtype="step", linestyle=style, linewidth=1.6, label=f"{label} ({len(v)})"
        )
    axes[0, 0].set(xlabel=xlabel, ylabel="share", title=title)
    axes[0, 0].legend(fontsize=8)
    return figure


def heat_map(
    matrix, rows: Sequence[str], columns: Sequence[str], *, xlabel="heard", ylabel="asked", title="", unit="share"
) -> Figure:
    """A matrix (rows, columns) as colours with its numbers: events asked against heard, or any table of shares."""
    values = _numpy(matrix)
    figure, axes = _axes(size=(max(4.5, 1.8 + 0.42 * len(columns)), 1.4 + 0.34 * len(rows)))
    ax = axes[0, 0]
    image = ax.imshow(values, cmap="cividis", aspect="auto")
    ax.grid(False)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.set_xticks(range(len(columns)), [str(c).replace("_", " ") for c in columns], rotation=60, ha="right", fontsize=7)
    ax.set_yticks(range(len(rows)), [str(r).replace("_", " ") for r in rows], fontsize=7)
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value) and value:
            text = f"{value:.2f}".removeprefix("0") if abs(value) < 1 else f"{value:g}"
            ax.text(j, i, text, ha="center", va="center", fontsize=6, color="black" if value > middle else "white")
    figure.colorbar(image, ax=ax, label=unit)
    return figure


def event_heat_map(asked, heard, classes: Sequence[str]) -> Figure:
    """Row i, column j: share of clips asking for event i in which event j is heard; counts (M, classes) each."""
    asked, heard = _numpy(asked) > 0, np.minimum(_numpy(heard), 1)
    clips = asked.sum(0)[:, None]
    matrix = np.divide(asked.T.astype(float) @ heard, clips, out=np.full((len(classes),) * 2, np.nan), where=clips > 0)
    title = "share of the clips asking for the row's event in which the column's is heard"
    return heat_map(matrix, classes, classes, title=_wrap(title, 60))


def bars_with_intervals(
    table: pd.DataFrame, by: str, *, metric: str = "exact", hue: str = "system", title: str = ""
) -> Figure:
    """Bars with 95 % intervals from `metrics.summarise`: groups of `by` on the axis, a colour per `hue`; n below."""
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise ValueError(f"metric {metric!r}: the table has {sorted(table['metric'].unique())}; choose among them")
    if rows.duplicated([by, hue] if by != hue else [by]).any():
        raise ValueError(
            f"several rows for one ({by}, {hue}): filter the table (one setting) or group by fewer columns"
        )
    groups, hues = list(rows[by].unique()), list(rows[hue].unique()) if hue != by else [None]
    figure, axes = _axes(size=(max(5.0, 1.2 + max(0.9, 0.32 * (len(hues) + 1)) * len(groups)), 3.4))
    ax, width = axes[0, 0], 0.8 / len(hues)
    for index, name in enumerate(hues):
        part = (rows if name is None else rows[rows[hue] == name]).set_index(by).reindex(groups)
        place = np.arange(len(groups)) - 0.4 + width * (index + 0.5)
        mean = part["mean"].to_numpy(float)
        errors = np.abs(part[["low", "high"]].to_numpy(float).T - mean)
        ax.bar(place, mean, width * 0.92, color=_color(name, index), label=name)
        ax.errorbar(place, mean, errors, fmt="none", ecolor="#333333", capsize=2, linewidth=1)
    counts = rows.groupby(by, sort=False)["n"].max()
    ax.set_xticks(range(len(groups)), [f"{g}\nn={counts[g]}".replace(", ", ",\n") for g in groups])
    ax.set(ylabel=f"{metric.replace('_', ' ')} (95 % interval)", xlabel=by.replace("_", " "), title=title)
    ax.grid(axis="x", visible=False)
    if hues != [None]:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def lines_with_intervals(
    table: pd.DataFrame, x: str, *, metric: str = "exact", hue: str = "system", title: str = ""
) -> Figure:
    """A metric and its 95 % band over a number such as guidance; table from `metrics.summarise` by x and hue."""
    rows = table[table["metric"] == metric]
    figure, axes = _axes(size=(6.5, 3.2))
    for index, (name, part) in enumerate(rows.groupby(hue, sort=False)):
        part, color = part.sort_values(x), _color(name, index)
        axes[0, 0].plot(part[x], part["mean"], marker=MARKERS[index % len(MARKERS)], color=color, label=name)
        axes[0, 0].fill_between(part[x].astype(float), part["low"], part["high"], color=color, alpha=0.15, linewidth=0)
    axes[0, 0].set(xlabel=x.replace("_", " "), ylabel=f"{metric.replace('_', ' ')} (95 % interval)", title=title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def radar(table: pd.DataFrame, *, metric: str = "exact", axis: str = "part", hue: str = "system", title: str = "") -> Figure:
    """A metric of several systems (polygons) over parts (axes) with 95 % bands and whiskers; table from `parts.by_part`.

    The centre is not 0 but stands under the figure, as intervals would else be too small to see. Raises ValueError for fewer
    than three axes, and for more than one row per part and system.
    """
    rows = table[(table["metric"] == metric) & table["mean"].notna()]
    names, hues = list(rows[axis].unique()), list(rows[hue].unique())
    if len(names) < 3 or rows.duplicated([axis, hue]).any():
        raise ValueError(
            f"{metric!r} over {len(names)} values of {axis}: a radar needs 3 or more, and one row for each {hue} and {axis} "
            "(filter one setting); bars_with_intervals draws fewer"
        )
    lowest, highest = np.nanmin(rows[["mean", "low"]].to_numpy(float)), np.nanmax(rows[["mean", "high"]].to_numpy(float))
    margin = 0.15 * (highest - lowest) or 0.1
    centre = max(0.0, lowest - margin) if lowest >= 0 else lowest - margin
    figure, axes = _axes(size=(6.8, 5.0), subplot_kw={"projection": "polar"})
    figure.get_layout_engine().set(rect=(0.09, 0, 0.91, 1))  # it does not see how far the labels of the left reach
    ax, angles = axes[0, 0], 2 * np.pi * np.arange(len(names)) / len(names)
    for index, name in enumerate(hues):
        part, color = rows[rows[hue] == name].set_index(axis).reindex(names), _color(name, index)
        mean, low, high = (part[end].to_numpy(float) for end in ("mean", "low", "high"))
        beside = angles + 0.04 * (index - (len(hues) - 1) / 2)  # else the whiskers of all systems cover each other
        mean, low, high, around = (np.append(values, values[0]) for values in (mean, low, high, beside))
        ax.plot(around, mean, color=color, marker=MARKERS[index % len(MARKERS)], markersize=4, linewidth=1.2, label=name)
        ax.fill_between(around, low, high, color=color, alpha=0.1, linewidth=0)
        ax.vlines(beside, low[:-1], high[:-1], color=color, linewidth=1.6)
    counts = rows.groupby(axis, sort=False)["n"].max()
    ax.set(theta_offset=np.pi / 2, theta_direction=-1, ylim=(centre, highest + 0.2 * margin), title=_wrap(title, 60))
    ax.set_rlabel_position(180 / len(names))
    ax.set_xticks(angles, [f"{name}\nn={counts[name]}" for name in names])
    for label, angle in zip(ax.get_xticklabels(), angles, strict=True):
        side = np.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    ax.tick_params(axis="y", labelsize=7)
    ax.set_xlabel(f"{metric.replace('_', ' ')} (95 % intervals); the centre is {centre:.3g}")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def gains(table: pd.DataFrame, *, metric: str = "exact", base: str = "base", title: str = "") -> Figure:
    """Paired gains over base with 95 % intervals, a line per system and setting, from `ttabench.headline_table`.

    Coloured where the interval is clear of 0, Holm's p is under 0.05 and, over several seeds, Student's interval is clear too, so
    exactly what `report.words` calls shown.
    """
    rows = table[np.isfinite(table[f"{metric}_gain"].astype(float))].iloc[::-1]
    figure, axes = _axes(size=(6.5, 0.8 + 0.3 * max(len(rows), 1)))
    ax = axes[0, 0]
    for place, (_, row) in enumerate(rows.iterrows()):
        middle, low, high = (float(row[f"{metric}_gain{end}"]) for end in ("", "_low", "_high"))
        t_low, t_high = (float(row[f"{metric}_t{end}"]) for end in ("_low", "_high"))
        clear = (low > 0 or high < 0) and row[f"{metric}_p_holm"] < 0.05 and not t_low <= 0 <= t_high
        ax.plot([low, high], [place, place], color=COLORS[0] if clear else "#888888", linewidth=2)
        ax.plot(middle, place, marker="o" if clear else "D", color=COLORS[0] if clear else "#888888")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(rows)), [f"{row['system']} ({row['setting']})" for _, row in rows.iterrows()])
    ax.set(xlabel=f"gain of {metric.replace('_', ' ')} over {base}\n(paired 95 % interval; grey: not shown to differ)", title=title)
    return figure


def judge_agreement(a, b, *, labels: tuple[str, str], truth=None) -> Figure:
    """Two judges' scores of the same clips (M,) and their Spearman correlation; truth (M,) of 0 and 1 colours them."""
    a, b = _numpy(a), _numpy(b)
    known = np.isfinite(a) & np.isfinite(b)
    rank = pd.Series(a[known]).corr(pd.Series(b[known]), method="spearman")
    figure, axes = _axes(size=(4.6, 4))
    ax = axes[0, 0]
    groups = (
        [("clips", known)]
        if truth is None
        else [(name, known & (_numpy(truth) == value)) for name, value in (("true is no", 0), ("true is yes", 1))]
    )
    for index, (name, rows) in enumerate(groups):
        label = f"{name} ({int(rows.sum())})"
        ax.scatter(a[rows], b[rows], s=12, alpha=0.6, color=COLORS[1 - index], marker=MARKERS[index], label=label)
    ax.set(xlabel=labels[0], ylabel=labels[1], title=f"Spearman {rank:.2f}, {int(known.sum())} clips")
    ax.legend()
    return figure


def calibration_curve(table: pd.DataFrame, errors: pd.DataFrame, *, title: str = "") -> Figure:
    """How often captions are true over the probability that a judge gives them, a curve a judge with 95 % intervals; on the
    dashed line a score means what it says. table, errors: `agreement.reliability_table` and `calibration_table`."""
    figure, axes = _axes(size=(5.6, 3.8))
    ax, errors = axes[0, 0], errors.set_index("reward")
    ax.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
    for index, (name, part) in enumerate(table.groupby("reward", sort=False)):
        share, color = part["share_true"].to_numpy(float), COLORS[index % len(COLORS)]
        ends = np.abs(part[["share_true_low", "share_true_high"]].to_numpy(float).T - share)
        found, low, high = errors.loc[name, ["ece", "ece_low", "ece_high"]].astype(float)
        label = f"{name}: error {found:.3f} [{low:.3f}, {high:.3f}]"
        marker = MARKERS[index % len(MARKERS)]
        ax.errorbar(part["mean_score"], share, ends, marker=marker, color=color, label=label, capsize=2, linewidth=1.2)
    ax.set(xlabel="mean score of the bin", ylabel="share of true captions (95 % interval)", title=title)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.legend(loc="lower right", fontsize=8)
    return figure


def agreement_matrix(table: pd.DataFrame, *, value: str = "spearman", title: str = "") -> Figure:
    """How far each two judges agree, below the diagonal, with the 95 % interval under each number; colours from 0 to 1.

    table: `agreement.agreement_table`; value: spearman, kappa or alike.
    """
    names = list(dict.fromkeys([*table["a"], *table["b"]]))
    figure, axes = _axes(size=(1.6 + 0.95 * len(names), 1.2 + 0.6 * len(names)))
    ax, matrix = axes[0, 0], np.full((len(names),) * 2, np.nan)
    for _, row in table.iterrows():
        place, found = (names.index(row["b"]), names.index(row["a"])), float(row[value])
        matrix[place] = found
        text = "–"
        if np.isfinite(found):
            text = f"{found:.2f}\n[{float(row[f'{value}_low']):.2f}, {float(row[f'{value}_high']):.2f}]"
        ax.text(place[1], place[0], text, ha="center", va="center", fontsize=7, color="white" if found <= 0.5 else "black")
    edges = (-0.5, len(names) - 1.5, len(names) - 0.5, 0.5)
    image = ax.imshow(matrix[1:, :-1], cmap="cividis", vmin=0, vmax=1, aspect="auto", extent=edges)
    ax.grid(False)
    ax.set_xticks(range(len(names) - 1), [_wrap(name, 12) for name in names[:-1]])
    ax.set_yticks(range(1, len(names)), [_wrap(name, 14) for name in names[1:]])
    ax.set(title=title, xlabel="95 % intervals in brackets")
    figure.colorbar(image, ax=ax, label=value)
    return figure


def _wrap(text: str, width: int) -> str:
    # a dollar sign in a caption would start matplotlib's mathematics
    return textwrap.fill(text, width).replace("$", r"\$")
