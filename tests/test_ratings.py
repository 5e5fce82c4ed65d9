"""Human ratings: files as raters leave them, means by hand, known correlations, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from resonate_lib.data import prompts
from resonate_lib.evaluation import parts, ratings, stats, ttabench

HEAD = "complexity,enjoyment,quality,alignment,usefulness"


def write(folder, name, *lines, head=f"file,rater,{HEAD}"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return path


def test_means_by_hand_per_kind_and_system_without_the_probe(tmp_path):
    lines = ["S001_P0001.wav,a,1,2,3,4,5", "S001_P0001.wav,b,3,2,5,4,5", "S001_P0002.wav,a,5,2,7,4,", "S000_P0002.wav,a,9,9,9,9,9"]
    write(tmp_path, "S001/acc/all_mos_common.csv", *lines)
    write(tmp_path, "S000/acc/all_mos_pro.csv", "S000_P0001.wav,c,9,9,9,9,9")  # nothing but the probe
    write(tmp_path, "S001/acc/all_mos_pro.csv", "S001_P0001.wav,c,2,2,2,2,2", "S002_P0001.wav,c,8,8,8,8,8")
    found = ratings.read(tmp_path, systems={1: "base"})
    assert list(found.columns) == list(ratings.COLUMNS) and len(found) == 5
    assert found["quality"].dtype == float
    assert set(found["system"]) == {"base", "S002"} and set(found["id"]) == {"prompt_0001", "prompt_0002"}
    table = ratings.means(found, n=200).set_index(["kind", "system", "dimension"]).sort_index()
    assert table.loc[("common", "base"), "mean"].to_dict() == {
        "complexity": 3, "enjoyment": 2, "quality": 5, "alignment": 4, "usefulness": 5,
    }  # fmt: skip
    line = table.loc[("common", "base", "usefulness")]
    assert line[["n", "prompts", "raters"]].tolist() == [2, 1, 2] and math.isnan(line["low"])  # one cell is empty
    line = table.loc[("common", "base", "quality")]
    assert line[["n", "prompts", "raters"]].tolist() == [3, 2, 2] and 3 <= line["low"] < 5 < line["high"] <= 7
    assert table.loc[("expert", "S002", "quality"), "mean"] == 8 and ("expert", "base", "quality") in table.index


def test_files_as_the_published_tool_reads_them(tmp_path):
    """A file per rater with its own headings, the rater in its name; and the same gathered, with person_id."""
    head = "name,复杂度,喜爱度,质量,一致性,实用性"
    write(tmp_path, "result-ann01.csv", "S003_P1801.wav,1,2,3,4,5", head="\ufeff" + head)
    found = ratings.read(tmp_path / "result-ann01.csv", kind="pro")
    assert found.iloc[0].tolist() == ["expert", "S003", "prompt_1801", "ann01", 1, 2, 3, 4, 5]
    head = head.replace("name", "wav_name,person_id")
    path = write(tmp_path, "all_mos_common.csv", "acc/S003_P1801.wav,ann01,1,2,3,4,5", head=head)
    again = ratings.read(path)
    pd.testing.assert_frame_equal(again, found.assign(kind="common"))


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("system,prompt", "S002,prompt_0007"),
        ("system,prompt", "S002,P0007"),
        ("system,id", "S002,prompt_0007"),
        ("system,file", "S002,prompt_0007.wav"),
        ("system,clip", "S002,some/where/prompt_0007"),
        ("system,file", "S009,S002_P0007.flac"),
    ],
)
def test_every_way_to_name_a_clip(tmp_path, head, line):
    path = write(tmp_path, "a.csv", f"{line},expert,1,1,1,1,1", head=f"{head},kind,{HEAD}")
    assert ratings.read(path).iloc[0].tolist()[:4] == ["expert", "S002", "prompt_0007", ""]


@pytest.mark.parametrize(
    ("message", "name", "line", "head"),
    [
        (r"mos_pro\.csv, line 2: quality is 'good'; a number from 0 to 10", "mos_pro.csv", "S001_P0001.wav,a,1,1,good,1,1", None),
        (r"line 2: alignment is '55'", "mos_pro.csv", "S001_P0001.wav,a,1,1,1,55,1", None),
        (r"line 2: alignment is 'nan5'", "mos_pro.csv", "S001_P0001.wav,a,1,1,1,nan5,1", None),
        (r"line 2: kind of rater 'ratings'; allowed are common, expert, pro", "ratings.csv", "S001_P0001.wav,a,1,1,1,1,1", None),
        (r"line 2: 'S01_P0001.wav' is no clip", "mos_pro.csv", "S01_P0001.wav,a,1,1,1,1,1", None),
        (r"line 2: file 'x.wav', system '', prompt 'x' name no clip", "mos_pro.csv", "x.wav,a,1,1,1,1,1", None),
        (r"found columns file, quality; it needs complexity", "mos_pro.csv", "x.wav,1", "file,quality"),
        (r"it needs .*each once", "mos_pro.csv", "x.wav,x.wav,1,1,1,1,1", f"file,name,{HEAD}"),
        (r"not a CSV file", "mos_pro.csv", "", ""),
    ],
)
def test_errors_name_file_line_and_what_is_allowed(tmp_path, message, name, line, head):
    path = write(tmp_path, name, line, **({} if head is None else {"head": head}))
    with pytest.raises(ValueError, match=message):
        ratings.read(path)


def test_a_rater_rates_a_clip_once_and_files_must_exist(tmp_path):
    write(tmp_path, "a_pro.csv", "S001_P0001.wav,a,1,1,1,1,1")
    write(tmp_path, "b_pro.csv", "S001_P0002.wav,a,1,1,1,1,1", "S001_P0001.wav,a,2,2,2,2,2")
    with pytest.raises(ValueError, match=r"b_pro\.csv, line 3: rater a rates S001, prompt_0001 twice"):
        ratings.read(tmp_path)
    for path in (tmp_path / "empty", tmp_path / "absent.csv"):
        with pytest.raises(FileNotFoundError, match="no ratings in"):
            ratings.read(path)
    unnamed = write(tmp_path, "c_pro.csv", "S001_P0001.wav,,1,1,1,1,1", "S001_P0001.wav,,3,3,3,3,3")
    table = ratings.means(ratings.read(unnamed), n=20)
    assert table["mean"].unique().tolist() == [2] and table["raters"].unique().tolist() == [0]  # two raters without a name


def rated(values, system="base", kind="common", raters=("a", "b"), spread=0.0):
    """Ratings of prompts 1, 2, ...: every dimension is the value, `spread` apart between raters."""
    lines = [
        (kind, system, f"prompt_{i:04}", rater, *[value + spread * place] * 5)
        for i, value in enumerate(values, 1)
        for place, rater in enumerate(raters)
    ]
    return pd.DataFrame(lines, columns=ratings.COLUMNS)


def test_prompts_and_raters_are_resampled():
    values = np.random.default_rng(0).uniform(2, 8, 60)
    same = ratings.means(rated(values)).iloc[0]
    assert same[["mean", "low", "high"]].tolist() == pytest.approx(list(stats.bootstrap_mean(values)))
    apart = ratings.means(rated(values, spread=2.0)).iloc[0]
    assert apart["mean"] == pytest.approx(values.mean() + 1)
    assert apart["high"] - apart["low"] > 1.5 * (same["high"] - same["low"])


def test_ratings_by_group_robustness_and_fairness():
    records = [
        {"id": "prompt_0001", "prompt_text": "x", "event_count": 1, "event_relation": "None"},
        {"id": "prompt_0002", "prompt_text": "x", "event_count": 2, "event_relation": "sequence"},
        {"id": "prompt_1801", "prompt_text": "X", "perturbation_type": "uppercase", "notes": "1"},
        {"id": "prompt_1851", "prompt_text": "y", "perturbation_type": "synonym", "notes": "2; x->y, 1"},
        {"id": "prompt_2101", "prompt_text": "m", "notes": "male"},
        {"id": "prompt_2151", "prompt_text": "f", "notes": "female"},
    ]
    values = dict(zip([record["id"] for record in records], (8.0, 4.0, 6.0, 4.0, 5.0, 4.0), strict=True))
    table = pd.DataFrame([("expert", "base", key, "a", *[v] * 5) for key, v in values.items()], columns=ratings.COLUMNS)
    rows = ratings.as_rows(table, records)
    assert set(rows["setting"]) == {"expert raters"}
    found = parts.within(rows, "accuracy", names=ratings.DIMENSIONS, n=20)
    assert found[found["metric"] == "quality"][["event_count", "event_relation", "mean"]].to_numpy().tolist() == [
        [1, "None", 8.0], [2, "sequence", 4.0],
    ]  # fmt: skip
    assert parts.robustness(rows, "quality", n=20)["mean"].tolist() == pytest.approx([0.75, 1.0, 0.875])
    assert parts.fairness(rows, "quality", n=20)["mean"].tolist() == pytest.approx([20.0])
    assert parts.by_part(rows, names=["quality"], n=20)["mean"].tolist() == pytest.approx([6.0, 5.0, 4.5])
    with pytest.raises(ValueError, match=r"1 rated prompts are not among the 5 records, such as prompt_2151"):
        ratings.as_rows(table, records[:-1])


def scored(values, system="base", **fields):
    table = pd.DataFrame({"id": [f"prompt_{i:04}" for i in range(1, len(values) + 1)], "clap": values})
    return table.assign(system=system, setting="g1", seed=0, sample=0, **fields)


def test_agreement_with_a_metric_by_hand():
    # ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6·4 / (5·24) = 0.8
    table = ratings.agreement(rated([1, 2, 3, 4, 5]), scored([0.2, 0.1, 0.4, 0.3, 0.5]), "clap", n=300)
    assert table["dimension"].tolist() == list(ratings.DIMENSIONS) and set(table["level"]) == {"clip"}
    line = table.iloc[0]
    assert line["mean"] == pytest.approx(0.8) and line["low"] < 0.8 < line["high"] <= 1
    assert line[["n", "prompts", "systems"]].tolist() == [5, 5, 1]
    twice = pd.concat([scored([0.1, 0.0, 0.5, 0.3, 0.4]), scored([0.3, 0.2, 0.3, 0.3, 0.6]).assign(sample=1)])  # the same means
    assert ratings.agreement(rated([1, 2, 3, 4, 5]), twice, "clap", n=20)["mean"][0] == pytest.approx(0.8)
    perfect = ratings.agreement(rated([1, 2, 3, 4, 5]), scored([1, 4, 9, 16, 25]), "clap", n=50).iloc[0]
    assert perfect[["mean", "low", "high"]].tolist() == pytest.approx([1, 1, 1])
    flat = ratings.agreement(rated([1, 2, 3, 4, 5]), scored([1.0] * 5), "clap", n=20).iloc[0]
    assert math.isnan(flat["mean"]) and math.isnan(flat["low"])


def test_agreement_interval_and_systems():
    rng = np.random.default_rng(0)
    truth = rng.uniform(2, 8, 150)
    better = {"base": truth, "DPO": truth + 0.5, "NFT": truth + 1.0}
    heard = pd.concat([rated(values, system) for system, values in better.items()])
    measured = pd.concat([scored(values + rng.normal(0, 2, 150), system) for system, values in better.items()])
    table = ratings.agreement(heard, measured, "clap", n=400).set_index(["dimension", "level"])
    clip = table.loc[("quality", "clip")]
    assert clip["mean"] == pytest.approx(spearmanr(np.concatenate(list(better.values())), measured["clap"])[0])
    assert clip["low"] < clip["mean"] < clip["high"] and clip["n"] == 450 and clip["prompts"] == 150 and clip["systems"] == 3
    one = ratings.agreement(heard[heard["system"] == "base"], measured, "clap", n=400).iloc[0]
    # about normal on both sides: the deviation of Spearman's rho is near (1 - rho²)·sqrt(1.06 / n)
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * (1 - one["mean"] ** 2) * math.sqrt(1.06 / 150), rel=0.25)
    system = table.loc[("quality", "system")]
    assert system["mean"] == 1 and system["n"] == 3


def test_agreement_says_what_does_not_meet():
    rows = scored([1, 2, 3])
    with pytest.raises(ValueError, match=r"common raters heard S001, the rows hold base: .*systems=\{1: 'base'\}"):
        ratings.agreement(rated([1, 2, 3], "S001"), rows, "clap")
    with pytest.raises(ValueError, match="rows of 2 settings"):
        ratings.agreement(rated([1, 2, 3]), pd.concat([rows, rows.assign(setting="g2")]), "clap")


def test_names_of_clips_go_both_ways():
    assert prompts.clip_name(1, {"id": "prompt_0001"}) == "S001_P0001.wav"
    for system, number in ((1, 1), (10, 2325), (999, 3000), (0, 2999)):
        name = prompts.clip_name(system, {"id": f"prompt_{number:04}"})
        assert prompts.parse_clip_name(name) == (system, f"prompt_{number:04}")
    assert prompts.parse_clip_name(r"C:\x\S002_P0003") == (2, "prompt_0003")
    for system, identity in ((1000, "prompt_0001"), (-1, "prompt_0001"), (1, "accuracy_test_0000"), (1, "prompt_3001")):
        with pytest.raises(ValueError, match="a clip's name needs a system from 0 to 999"):
            prompts.clip_name(system, {"id": identity})
    for name in ("prompt_0001.wav", "S1_P1.wav", "S001_P0001.wav.txt", ""):
        with pytest.raises(ValueError, match=r"names are like S001_P0001\.wav"):
            prompts.parse_clip_name(name)


def test_prompt_columns_of_ratings_are_those_of_the_benchmark():
    record = {"id": "prompt_2701", "prompt_text": "x", "notes": "source_prompt:x", "categories": ["hate"]}
    rows = ratings.as_rows(rated([1.0]).assign(id="prompt_2701"), [record])
    assert set(ttabench.PROMPT_COLUMNS) <= set(rows.columns) and set(rows["categories"]) == {"hate"}
