"""Every figure: what it draws is the data it was given, and it can be rendered."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from resonate_lib import plots

RATE = 16000
TONE = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(4 * RATE) / RATE)
RECORD = {
    "caption": "two dings ring, followed by a dog that costs $5 and $6",
    "groups": [["ding", 2], ["dog", 1]],
    "kind": "count",
    "events": [
        {"name": "ding", "onset": 0.2, "offset": 0.9, "level_db": -3.0},
        {"name": "ding", "onset": 1.1, "offset": 1.8, "level_db": -5.0},
        {"name": "dog", "onset": 2.2, "offset": 3.0, "level_db": 0.0},
    ],
}
HISTORY = [{"step": i, "loss": 1 / (i + 1), "reward": 0.01 * i} for i in range(50)]
SUMMARY = pd.DataFrame(
    [
        (kind, system, "exact", 0.5, 0.4, 0.6, 100, 100, 1)
        for kind in ("single", "while", "count")
        for system in ("base", "DPO", "NFT")
    ],
    columns=["kind", "system", "metric", "mean", "low", "high", "n", "prompts", "seeds"],
)
HEADLINE = pd.DataFrame(
    {
        "setting": "guidance 1",
        "system": ["base", "NFT"],
        "exact": [0.5, 0.62],
        "exact_gain": [np.nan, 0.12],
        "exact_gain_low": [np.nan, 0.08],
        "exact_gain_high": [np.nan, 0.16],
        "exact_p_holm": [np.nan, 0.01],
        "exact_t_low": np.nan,
        "exact_t_high": np.nan,
    }
)
rng = np.random.default_rng(0)

FIGURES = {
    "spectrogram": lambda: plots.spectrogram(TONE, RATE),
    "spectrogram_row": lambda: plots.spectrogram_row({"base": TONE, "NFT": TONE * 0.1}, RATE, title="a tone"),
    "scene_timeline": lambda: plots.scene_timeline(RECORD, TONE, RATE),
    "corpus_statistics": lambda: plots.corpus_statistics([RECORD] * 5),
    "training_curves": lambda: plots.training_curves(HISTORY, ["loss", "reward"], smooth=5, units={"loss": "nats"}),
    "reward_curves": lambda: plots.reward_curves({"GRPO": HISTORY, "NFT": HISTORY}),
    "ode_vs_sde": lambda: plots.ode_vs_sde(
        np.linspace(1, 0, 6), rng.normal(size=(4, 6, 3, 2)), rng.normal(size=(4, 6))
    ),
    "pairs_histogram": lambda: plots.pairs_histogram(rng.normal(1, 1, 99), rng.normal(0, 1, 99)),
    "score_histogram": lambda: plots.score_histogram({"true": rng.random(50), "swapped": rng.random(40)}),
    "event_heat_map": lambda: plots.event_heat_map([[1, 0], [0, 2], [1, 1]], [[1, 1], [0, 1], [3, 0]], ["ding", "dog"]),
    "bars_with_intervals": lambda: plots.bars_with_intervals(SUMMARY, "kind"),
    "lines_with_intervals": lambda: plots.lines_with_intervals(SUMMARY.assign(guidance=[1, 2, 3] * 3), "guidance"),
    "radar": lambda: plots.radar(SUMMARY, axis="kind"),
    "gains": lambda: plots.gains(HEADLINE),
    "judge_agreement": lambda: plots.judge_agreement(
        rng.random(30), rng.random(30), labels=("CLAP", "LALM"), truth=rng.random(30) > 0.5
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_renders_and_is_closed(name):
    before = plt.get_fignums()
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and plt.get_fignums() == before
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    assert len(buffer.getvalue()) > 1000
    for ax in figure.axes:
        if ax.get_visible() and ax.axison and ax.lines:
            assert ax.get_xlabel() or ax.get_ylabel(), "an axis without a label"


def test_a_tone_stands_at_its_frequency_and_level():
    values = plots.spectrogram_db(TONE, RATE)
    assert values.shape[0] == 512
    assert values[:, 100].argmax() == 64  # 1000 Hz at 15.625 Hz a bin
    assert values[64, 100] == pytest.approx(20 * np.log10(0.5), abs=0.1)
    assert plots.spectrogram_db(torch.zeros(10), RATE).max() <= -190


def test_one_scale_for_a_row():
    figure = plots.spectrogram_row({"a": TONE, "b": TONE * 0.01}, RATE)
    assert len({image.get_clim() for ax in figure.axes for image in ax.images}) == 1


def test_heat_map_counts_by_hand():
    figure = plots.event_heat_map([[1, 0], [0, 2], [1, 1]], [[1, 1], [0, 1], [3, 0]], ["ding", "dog"])
    # clips asking for a ding: 0 and 2, a ding is heard in both, a dog in one; asking for a dog: 1 and 2
    assert np.allclose(figure.axes[0].images[0].get_array(), [[1, 0.5], [0.5, 0.5]])


def test_bars_show_the_table():
    ax = plots.bars_with_intervals(SUMMARY, "kind").axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.5] * 9
    assert [text.get_text() for text in ax.get_xticklabels()] == ["single\nn=100", "while\nn=100", "count\nn=100"]


def test_a_wrong_key_or_table_names_the_choice():
    with pytest.raises(ValueError, match=r"\['lss'\].*loss"):
        plots.training_curves(HISTORY, ["lss"])
    with pytest.raises(ValueError, match=r"metric 'f1'.*exact"):
        plots.bars_with_intervals(SUMMARY, "kind", metric="f1")
    with pytest.raises(ValueError, match="several rows"):
        plots.bars_with_intervals(pd.concat([SUMMARY, SUMMARY]), "kind")


def test_saved_figures_repeat_byte_for_byte(tmp_path):
    for name in ("a.png", "b.png"):
        plots.save(plots.training_curves(HISTORY, ["loss"]), tmp_path / "figures" / name)
    first, second = (path.read_bytes() for path in sorted((tmp_path / "figures").iterdir()))
    assert first == second
