"""The parts' aggregates against sums done by hand, exact pairing, simulated truth; the radar shows its table."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from resonate_lib import plots
from resonate_lib.data import prompts
from resonate_lib.evaluation import parts, stats, ttabench
from resonate_lib.versions import read_table


def row(identity, value, part, **fields):
    """A benchmark row with the columns that `ttabench.score_clips` fills for such a prompt."""
    empty = {"event_count": "", "event_relation": "None", "perturbation_type": "", "notes": "", "categories": ""}
    return {"setting": "g1", "system": "base", "seed": 0, "sample": 0, "id": identity, "part": part, "q": value, **empty, **fields}


def mean_of(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def test_accuracy_by_count_and_relation_by_hand():
    made = [
        (1, "None", 1.0), (1, "None", 0.0), (2, "sequence", 0.5), (2, "parallelism", 1.0), (2, "parallelism", 0.25),
    ]  # fmt: skip
    rows = [row(f"prompt_{i:04}", v, "accuracy", event_count=c, event_relation=r) for i, (c, r, v) in enumerate(made, 1)]
    rows += [row("prompt_1501", 0.3, "generalization", event_count=3), row("prompt_1801", 0.1, "robustness")]
    table = parts.within(pd.DataFrame(rows), "accuracy", names=("q",), n=50)
    found = [(*line[2:4], line[5]) for line in table.itertuples(index=False)]
    assert found == [(1, "None", 0.5), (2, "parallelism", 0.625), (2, "sequence", 0.5)]
    assert table["n"].tolist() == [2, 2, 1] and math.isnan(table["low"][2])
    table = parts.within(pd.DataFrame(rows), "generalization", names=("q",), n=50)
    assert (table["event_count"].item(), table["mean"].item()) == (3, 0.3)


def test_tables_survive_being_written_and_read(tmp_path):
    relations = ("None", "sequence")
    rows = pd.DataFrame(
        [row(f"prompt_{i:04}", i / 10, "accuracy", event_count=1 + i % 2, event_relation=relations[i % 2]) for i in range(1, 9)]
        + [row(f"prompt_{1800 + i}", i / 10, "robustness", perturbation_type="space", notes=str(i)) for i in range(1, 5)]
    )
    before = parts.tables(rows, names=("q",), n=50)
    rows.to_csv(tmp_path / "rows.csv", index=False)
    after = parts.tables(read_table(tmp_path / "rows.csv"), names=("q",), n=50)
    assert list(before) == list(after) == ["parts", "accuracy", "robustness", "robustness_ratio"]
    for name, table in before.items():
        pd.testing.assert_frame_equal(table, after[name])


def test_parts_stand_in_the_order_of_the_benchmark_without_clean():
    rows = [row("prompt_2701", 0.1, "toxicity"), row("a", 0.2, "generalization"), row("a", 0.9, "clean"), row("b", 0.4, "accuracy")]
    table = parts.by_part(pd.DataFrame(rows + [{**r, "system": "NFT"} for r in rows]), names=("q",), n=20)
    assert table["part"].tolist() == ["accuracy", "generalization", "toxicity"] * 2
    assert table["system"].tolist() == ["base"] * 3 + ["NFT"] * 3 and table["mean"].tolist() == [0.4, 0.2, 0.1] * 2


def test_six_perturbations_of_a_prompt_are_one_unit():
    values = np.random.default_rng(0).random(50)
    rows = pd.DataFrame(
        row(f"prompt_{1801 + 50 * k + i}", values[i], "robustness", perturbation_type=kind, notes=f"{i + 1}; a->b, {k}")
        for k, kind in enumerate(prompts.PERTURBATION_TYPES)
        for i in range(50)
    )
    found = parts.by_part(rows, names=("q",)).iloc[0]
    want = stats.bootstrap_mean(values)  # 300 copies of 50 numbers say no more than the 50
    assert found["n"] == 300 and found["prompts"] == 50
    assert (found["high"] - found["low"]) == pytest.approx(want.high - want.low, rel=0.1)


def bias_and_toxicity():
    notes = {
        "From train.csv, audiocap_id: 7": 0.2,
        "From val.csv, audiocap_id: 8": 0.4,
        "Generated from gender-specific prompt: 'a woman speaks to men'": 0.5,
        "Generated from gender-specific prompt: 'several men talk'": 0.7,
    }
    rows = [row(f"prompt_{2401 + i}", v, "bias", notes=note) for i, (note, v) in enumerate(notes.items())]
    named = {"hate": (0.1, 0.3), "shocking": (0.6,)}
    made = [(name, v) for name, values in named.items() for v in values]
    return rows + [row(f"prompt_{2701 + i}", v, "toxicity", categories=name) for i, (name, v) in enumerate(made)]


def test_bias_by_origin_and_toxicity_by_category():
    rows = pd.DataFrame(bias_and_toxicity())
    table = parts.within(rows, "bias", names=("q",), n=20)
    assert dict(zip(table["origin"], table["mean"].round(9), strict=True)) == {
        "neutral caption": 0.3, "made neutral: man": 0.7, "made neutral: woman": 0.5,
    }  # fmt: skip
    table = parts.within(rows, "toxicity", names=("q",), n=20)
    assert dict(zip(table["categories"], table["mean"], strict=True)) == {"hate": 0.2, "shocking": 0.6}


def perturbed_rows(ratio=0.8, clean=True):
    """Two perturbations of four prompts each: `space` is worth ratio of the clean prompt, `rewrite` half of it."""
    values = {"space": [1.0, 0.5, 0.25, 0.75], "rewrite": [0.2, 0.4, 0.6, 0.8]}
    rows = []
    for kind, factor in (("space", ratio), ("rewrite", 0.5)):
        for i, value in enumerate(values[kind]):
            name = f"robustness_{kind}_{i}"
            rows.append(row(name, factor * value, "robustness", perturbation_type=kind))
            rows += [row(name, value, "clean", perturbation_type=kind)] if clean else []
    return rows


def test_robustness_pairs_every_prompt_with_its_clean_self():
    table = parts.robustness(pd.DataFrame(perturbed_rows()), "q", n=200)
    assert table["perturbation_type"].tolist() == ["space", "rewrite", "overall"] and set(table["metric"]) == {"q_ratio"}
    for kind, ratio in (("space", 0.8), ("rewrite", 0.5), ("overall", 0.65)):
        # whichever prompts are drawn, both sides are drawn together: the interval has no width
        assert mean_of(table, perturbation_type=kind)[["mean", "low", "high"]].tolist() == pytest.approx([ratio] * 3)
    assert mean_of(table, perturbation_type="space")[["n", "prompts", "seeds"]].tolist() == [4, 4, 1]
    assert mean_of(table, perturbation_type="overall")[["n", "prompts", "seeds"]].tolist() == [8, 8, 1]
    by_hand = ttabench.robustness_score([0.8, 0.4, 0.2, 0.6], [1.0, 0.5, 0.25, 0.75])
    assert table["mean"][0] == pytest.approx(by_hand)


def test_gains_of_every_part_are_paired_and_corrected_together():
    rng, rows = np.random.default_rng(0), []
    for part, gain in (("accuracy", 0.3), ("generalization", 0.0)):
        for i, value in enumerate(rng.random(40)):
            for system, more in (("base", 0.0), ("NFT", gain)):
                rows.append(row(f"{part}_{i}", value + more + 0.01 * rng.random(), part, system=system, event_count=1))
    rows += [row("x", 0.5, "clean", system=system) for system in ("base", "NFT")]
    table = parts.gains(pd.DataFrame(rows), names=("q",), n=400).set_index("part")
    assert list(table.index) == ["accuracy", "generalization"] and set(table["system"]) == {"NFT"}
    assert table["gain"].to_dict() == pytest.approx({"accuracy": 0.3, "generalization": 0.0}, abs=0.01)
    assert table["shown"].to_dict()["accuracy"] == 1 and set(table["prompts"]) == {40}
    assert table["p_holm"].tolist() == stats.holm(table["p"]).tolist()
    without = pd.DataFrame([line for line in rows if line["system"] != "base"])
    assert parts.gains(without, names=("q",), n=20).empty
    many = [{**line, "system": f"NFT {k}"} for k in range(30) for line in rows if line["system"] == "NFT"]
    table = parts.gains(pd.DataFrame([*rows, *many]), names=("q",), n=400)  # of 62 comparisons 400 resamples would show none
    assert len(table) == 62 and (table[table["part"] == "accuracy"]["shown"] == 1).all()
    assert "parts_gains" in parts.tables(pd.DataFrame(rows), names=("q",), n=20)


def test_a_robuster_system_is_told_by_paired_ratios():
    weak = [{**line, "system": "base"} for line in perturbed_rows(ratio=0.6)]
    strong = [{**line, "system": "NFT"} for line in perturbed_rows(ratio=0.8)]
    table = parts.robustness(pd.DataFrame(weak + strong), "q", n=100).set_index(["system", "perturbation_type"])
    assert table.loc["base", "gain"].isna().all()
    ends = table.loc[("NFT", "space"), ["gain", "gain_low", "gain_high"]].tolist()
    assert ends == pytest.approx([0.2] * 3)  # both lose the same share of every prompt: no width
    assert table.loc[("NFT", "rewrite"), "gain"] == 0 and table.loc[("NFT", "overall"), "gain"] == pytest.approx(0.1)
    other = [line for line in strong if line["id"] != "robustness_space_0"]
    table = parts.robustness(pd.DataFrame(weak + other), "q", n=50)
    assert table["gain"].isna().all()  # other prompts are no pairs


def test_robustness_as_the_published_tool_computes_it():
    table = parts.robustness(pd.DataFrame(perturbed_rows(clean=False)), "q", baseline="published", n=50)
    # perturbed means: space 0.5, rewrite 0.25, all 0.375
    assert table["mean"].tolist() == pytest.approx([0.5 / 0.375, 0.25 / 0.375, 1.0])
    assert table["mean"][2] == 1.0 and table["n"].tolist() == [4, 4, 8]
    assert table["low"][0] < table["mean"][0] < table["high"][0]


def test_robustness_finds_the_originals_among_the_accuracy_prompts():
    clean = {8: 0.5, 11: 1.0}
    rows = [row(f"prompt_{n:04}", v, "accuracy", event_count=1) for n, v in clean.items()]
    rows += [row("prompt_1801", 0.4, "robustness", perturbation_type="uppercase", notes="8")]
    rows += [row("prompt_1802", 0.6, "robustness", perturbation_type="uppercase", notes="11")]
    rows += [row("prompt_1851", 0.3, "robustness", perturbation_type="synonym", notes="8; a->b, 4")]
    rows += [row("prompt_1852", 0.9, "robustness", perturbation_type="synonym", notes="16; c->d, 2")]  # 16 was not generated
    table = parts.robustness(pd.DataFrame(rows), "q", n=50).set_index("perturbation_type")
    assert table["mean"].to_dict() == pytest.approx({"uppercase": 1.0 / 1.5, "synonym": 0.6, "overall": (1 / 1.5 + 0.6) / 2})
    assert table["n"].to_dict() == {"uppercase": 2, "synonym": 1, "overall": 3} and math.isnan(table.loc["synonym", "low"])


def test_a_baseline_of_zero_is_left_out_of_the_overall_ratio():
    rows = perturbed_rows() + [row("z", 0.5, "robustness", perturbation_type="punctuate"), row("z", 0.0, "clean")]
    table = parts.robustness(pd.DataFrame(rows), "q", n=50).set_index("perturbation_type")
    assert math.isnan(table.loc["punctuate", "mean"]) and table.loc["overall", "mean"] == pytest.approx(0.65)


def test_robustness_says_what_is_missing():
    rows = pd.DataFrame(perturbed_rows(clean=False))
    with pytest.raises(ValueError, match=r"no unperturbed prompts among the rows.*published"):
        parts.robustness(rows, "q")
    with pytest.raises(ValueError, match="baseline='mine': use one of unperturbed, published"):
        parts.robustness(rows, "q", baseline="mine")
    with pytest.raises(ValueError, match="no rows of the part robustness"):
        parts.robustness(rows.assign(part="clean"), "q")
    with pytest.raises(ValueError, match="no rows of the part bias: they hold robustness"):
        parts.within(rows, "bias", names=("q",))
    with pytest.raises(ValueError, match="'perturbation_type' were made by an older"):
        parts.within(rows.drop(columns="perturbation_type"), "robustness", names=("q",))


def test_ratio_interval_agrees_with_the_delta_method():
    rng = np.random.default_rng(1)
    clean = rng.uniform(0.3, 0.9, 100)
    perturbed = np.clip(0.8 * clean + rng.normal(0, 0.1, 100), 0, 1)
    rows = [row(f"p{i}", v, "robustness", perturbation_type="space") for i, v in enumerate(perturbed)]
    rows += [row(f"p{i}", v, "clean", perturbation_type="space") for i, v in enumerate(clean)]
    found = parts.robustness(pd.DataFrame(rows), "q").iloc[0]
    ratio = perturbed.mean() / clean.mean()
    error = np.std(perturbed - ratio * clean, ddof=1) / clean.mean() / 10
    assert found["mean"] == pytest.approx(ratio)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def speakers(means, each=25, spread=0.1, seed=0):
    """Rows of a fairness part: `each` prompts of every attribute, normal around its mean."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        row(f"prompt_{name}_{i}", mean + spread * rng.standard_normal(), "fairness", notes=name)
        for name, mean in means.items()
        for i in range(each)
    )


def test_fairness_is_the_published_score_of_the_attribute_means():
    rows = speakers({"male": 0.5, "female": 0.6, "old": 0.4, "middle": 0.5, "youth": 0.6, "child": 0.7, "zh": 0.5, "robot": 0.1})
    table = parts.fairness(rows, "q", n=400)
    assert table["speakers"].tolist() == ["gender", "age"]  # one language alone has no pair, robots are no group
    for speakers_of, names in (("gender", ("male", "female")), ("age", ("old", "middle", "youth", "child"))):
        means = [rows.loc[rows["notes"] == name, "q"].mean() for name in names]
        line = mean_of(table, speakers=speakers_of)
        assert line["mean"] == pytest.approx(ttabench.fairness_score(means)) and line["low"] < line["mean"] < line["high"]
        assert line["p"] < 0.05 and line["chance"] < line["mean"] and line["n"] == line["prompts"] == 25 * len(names)
    by_attribute = parts.within(rows, "fairness", names=("q",), n=20)
    assert by_attribute["attribute"].tolist() == ["male", "female", "old", "middle", "youth", "child", "zh", "robot"]


def test_gaps_of_known_values():
    for values in ([5.1, 4.8], [5.0, 4.5, 4.0, 3.0], [6.0, 6.0, 6.0], [0.0, 0.0], [2.0, 0.0], [-1.0, -2.0]):
        assert parts._gaps(np.array([values, values])) == pytest.approx([ttabench.fairness_score(values)] * 2)


def test_chance_is_the_mean_over_all_deals():
    rows = pd.DataFrame(row(f"prompt_{v}", v, "fairness", notes="male" if v < 3 else "female") for v in (1, 2, 3, 4))
    line = parts.fairness(rows, "q", n=4000).iloc[0]
    deals = [ttabench.fairness_score([np.mean(two), (10 - sum(two)) / 2]) for two in itertools.combinations((1, 2, 3, 4), 2)]
    assert line["chance"] == pytest.approx(np.mean(deals), rel=0.05)
    assert line["p"] == pytest.approx(2 / 6, abs=0.03)  # two of the six deals part the numbers as far
    assert line["low"] == 0 and line["mean"] == pytest.approx(100 * 2 / 3.5)


@pytest.mark.parametrize("fall", [0.0, 0.1, 0.4])
def test_fairness_intervals_cover_the_truth(fall):
    """Four ages with means from 0.5 down to 0.5·(1 - fall), 25 prompts each: the interval holds the true score."""
    means = dict(zip(prompts.SPEAKERS["age"], 0.5 * (1 - fall * np.linspace(0, 1, 4)), strict=True))
    truth, held = ttabench.fairness_score(list(means.values())), 0
    for trial in range(100):
        line = parts.fairness(speakers(means, spread=0.15, seed=trial), "q", n=200, seed=trial).iloc[0]
        held += line["low"] <= truth <= line["high"]
    assert held >= 88, f"{held} of 100"


def test_training_seeds_widen_the_intervals():
    rows = speakers({"male": 0.5, "female": 0.6}, each=100)
    three = pd.concat([rows.assign(seed=k, q=rows["q"] + np.where(rows["notes"] == "male", 0.1 * k, 0)) for k in range(3)])
    one, many = (parts.fairness(table, "q", n=400).iloc[0] for table in (rows, three))
    assert many["seeds"] == 3 and many["high"] - many["mean"] > 2 * (one["high"] - one["mean"])


def test_all_tables_of_all_parts():
    rows = perturbed_rows() + bias_and_toxicity() + [row("g", 0.5, "generalization", event_count=1)]
    rows += [row("a", 1.0, "accuracy", event_count=1)]
    rows = pd.concat([pd.DataFrame(rows), speakers({"male": 0.5, "female": 0.6})])
    found = parts.tables(rows.assign(other=0.5), names=("q", "other"), n=50)
    assert set(found) == {"parts", *parts.BY, "robustness_ratio", "fairness_score"} and set(parts.SCOPE) == set(parts.BY)
    assert found["parts"]["part"].unique().tolist() == list(parts.BY)
    for table in found.values():
        assert {"setting", "system", "mean", "low", "high", "n", "prompts", "seeds"} <= set(table.columns)
        assert len(table["metric"].unique()) == 2
    assert list(parts.tables(rows[rows["part"] == "bias"], names=("q",), n=20)) == ["parts", "bias"]


def radar_table():
    names = list(parts.BY)
    lines = [
        (system, part, "q", 0.4 + 0.05 * i + shift, 0.37 + 0.05 * i + shift, 0.43 + 0.05 * i + shift, 100 + i)
        for system, shift in (("base", 0.0), ("NFT", 0.06))
        for i, part in enumerate(names)
    ]
    return pd.DataFrame(lines, columns=["system", "part", "metric", "mean", "low", "high", "n"])


def test_radar_draws_means_and_intervals():
    table = radar_table()
    figure = plots.radar(table, metric="q", title="$5 of six parts")
    ax = figure.axes[0]
    for line, (_, group) in zip(ax.lines, table.groupby("system", sort=False), strict=True):
        assert np.allclose(line.get_ydata(), [*group["mean"], group["mean"].iloc[0]])  # closed
    whiskers = [c for c in ax.collections if hasattr(c, "get_segments")]
    ends = np.array([[segment[:, 1] for segment in c.get_segments()] for c in whiskers])
    assert np.allclose(ends.reshape(12, 2), table[["low", "high"]])
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{part}\nn={100 + i}" for i, part in enumerate(parts.BY)]
    centre = float(ax.get_xlabel().split()[-1])
    assert ax.get_ylim()[0] == pytest.approx(centre, abs=1e-3) and 0 <= centre < 0.37


def test_radar_refuses_what_it_cannot_draw():
    table = radar_table()
    with pytest.raises(ValueError, match="over 2 values of part"):
        plots.radar(table[table["part"].isin(["bias", "toxicity"])], metric="q")
    with pytest.raises(ValueError, match="one row for each system and part"):
        plots.radar(pd.concat([table, table]), metric="q")
