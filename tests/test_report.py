"""Tables and sentences of the benchmark: corrected claims, power, intervals everywhere, Markdown and LaTeX, versions compared."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from resonate_lib import __main__ as cli
from resonate_lib import plots, record, runs, versions
from resonate_lib.evaluation import accuracy, across, agreement, metrics, report, stats, suite, ttabench


def made(gains, prompts=200, seeds=(0,), setting="guidance 1", salt=0, first=0):
    """Benchmark rows of systems whose exact match is base plus so many right answers, on prompts of mixed difficulty."""
    tables = []
    for seed in seeds:
        ids = [f"p{i:03}" for i in range(first, first + prompts)]
        luck = np.random.default_rng([seed, salt, first]).random(prompts)
        for system, gain in gains.items():
            right = (luck < 0.5 + gain).astype(float)
            table = pd.DataFrame({"id": ids, "exact": right, "tp": right, "fp": 0.0, "fn": 1 - right})
            table = table.assign(prompt_text=[f"text {i}" for i in ids], noise_seed=np.arange(prompts) + 1000 * seed)
            tables.append(table.assign(system=system, seed=seed, setting=setting, sample=0, guidance=1.0))
    rows = pd.concat(tables, ignore_index=True)
    return rows.reindex(columns=[*ttabench.COLUMNS]).assign(part="accuracy", kind="single")


def test_headline_has_p_effect_and_t():
    rows = made({"base": 0.0, "DPO": 0.1, "NFT": 0.2}, seeds=(0, 1, 2))
    line = report.headline_table(rows, names=("exact",)).set_index("system").loc["DPO"]
    sides = [rows[rows["system"] == name] for name in ("DPO", "base")]
    each = (sides[0].groupby("id")["exact"].mean() - sides[1].groupby("id")["exact"].mean()).to_numpy()
    assert line["exact_effect"] == pytest.approx(each.mean() / each.std(ddof=1))
    by_seed = sides[0].groupby("seed")["exact"].mean() - sides[1].groupby("seed")["exact"].mean()
    assert line[["exact_t", "exact_t_low", "exact_t_high"]].tolist() == pytest.approx(stats.t_interval(by_seed))
    assert line["exact_p_holm"] == pytest.approx(3 * line["exact_p"]) and line["exact_p"] == pytest.approx(2 / 2001)


def test_a_claim_needs_the_corrected_p_and_the_seeds():
    def claim(low, high, p, t=(math.nan, math.nan)):
        middle = (low + high) / 2
        found = stats.Comparison(stats.Interval(middle, low, high), p, 0.1, stats.Interval(middle, *t), 100, 1, 0.3)
        return report.Claim(found, p)

    assert claim(0.1, 0.3, 0.01).side == 1 and claim(-0.3, -0.1, 0.01).side == -1
    assert claim(0.1, 0.3, 0.06).side == claim(-0.1, 0.3, 0.01).side == claim(0.1, 0.3, math.nan).side == 0
    assert claim(0.1, 0.3, 0.01, (-0.1, 0.5)).side == 0 and claim(0.1, 0.3, 0.01, (0.05, 0.35)).side == 1


def test_words_correct_for_what_they_compare():
    # 11 of 200 prompts are gained and none lost: an interval clear of 0 that stays so after four comparisons
    names = {"base": 0.0, "base trained on": 0.0, "DPO": 0.05, "NFT": 0.1}
    text = report.words(made(names))
    assert "over the 4 comparisons here." in text and "DPO beats base" in text and "p = " in text and "; t " not in text
    assert "exact is the primary metric, all others are exploratory." in text
    one = few_gained()
    assert "DPO beats base: +2.5" in report.words(one)
    many = pd.concat([one] + [one[one["system"] == "DPO"].assign(system=f"rival {i}") for i in range(30)], ignore_index=True)
    said = report.words(many)
    assert "DPO is not shown to differ from base: +2.5 (+" in said and "beats" not in said
    seeds = report.words(made(names, seeds=(0, 1, 2)))
    assert "Student's interval over the seeds (t) clear of 0" in seeds and "; t +" in seeds


def few_gained(*others):
    """DPO gains five of 200 prompts and loses none: p is 0.009. The others are the base."""
    rows = made({"base": 0.0, "DPO": 0.0} | dict.fromkeys(others, 0.0))
    rows.loc[rows.index[(rows["system"] == "DPO") & (rows["exact"] == 0)][:5], "exact"] = 1.0
    return rows


@pytest.mark.parametrize(
    ("others", "family", "shown"),
    [(("NFT",), 3, 1), (("NFT", "DiffRO", "base trained on"), 6, 0), (("GRPO (LALM)", "GRPO (CLAP)"), 6, 0)],
)
def test_table_figure_and_words_make_one_claim(others, family, shown):
    """DPO's gain passes Holm's correction over the gains alone in each case, over all that is compared in the first alone."""
    rows = few_gained(*others)
    found, table = report.claims(rows), report.headline_table(rows, names=("exact",))
    line = table.set_index("system").loc["DPO"]
    assert len(found) == family and line["exact_p_holm"] == found["DPO", "base"].p and found["DPO", "base"].side == shown
    assert line["exact_p"] * (1 + len(others)) < 0.05  # what the gains alone would make of it
    ax = plots.gains(table).axes[0]
    bars = dict(zip((label.get_text() for label in ax.get_yticklabels()), ax.lines[::2], strict=False))
    assert (bars["DPO (guidance 1)"].get_color() == plots.COLORS[0]) == bool(shown)
    said = report.words(rows)
    assert f"over the {family} comparisons" in said and f"p = {report.p_text(line['exact_p_holm'])})" in said
    assert f"DPO {'beats' if shown else 'is not shown to differ from'} base: +2.5" in said
    assert ("GRPO (LALM) is not shown to differ from GRPO (CLAP)" in said) == ("GRPO (CLAP)" in others)


def test_words_and_table_say_what_was_learned_from(tmp_path):
    rows = made({"base": 0.0, "best of 4": 0.1, "DPO": 0.1, "NFT": 0.1})
    systems = pd.DataFrame({"system": ["base", "DPO", "NFT"], "clips_made": ["", 384, 11520]})
    learned_from = suite.clips_made(systems)
    assert learned_from == {"DPO": 384, "NFT": 11520} and suite.clips_made(systems[["system"]]) == {}
    said = report.words(rows, clips_made=learned_from)
    assert "nor the reverse. DPO learned from 384 clips, NFT from 11,520." in said and "learned" not in report.words(rows)
    folder = version(tmp_path, rows.assign(event_count=1, event_relation="None", tp_real=0, fp_real=0, fn_real=0), 1)
    runs.write_table(folder / "metrics", "tta_systems", systems)
    tables, said, _ = suite.over_seeds(folder, n=100)
    shown = report.readable(tables["tta_headline"], ("exact",)).set_index("system")
    assert shown.loc[["DPO", "NFT"], "clips_made"].tolist() == [384, 11520] and shown["clips_made"].isna().sum() == 2
    assert "DPO learned from 384 clips" in said and "| 11520 |" in report.to_markdown(shown.reset_index())


def test_power_note_by_hand():
    rows = made({"base": 0.0, "DPO": 0.1})
    each = rows[rows["system"] == "DPO"]["exact"].to_numpy() - rows[rows["system"] == "base"]["exact"].to_numpy()
    factor = 1.959964 + 0.841621
    shown, needed = factor * each.std(ddof=1) / math.sqrt(200), math.ceil((factor * each.std(ddof=1) / 0.05) ** 2)
    note = report.power_note(rows, "exact", difference=0.05)
    assert f"With these 200 prompts a difference of {100 * shown:.3g} points in exact can be shown; 5 points" in note
    assert f"5 points need {needed} prompts" in note and "seeds" not in note
    assert 0.05 < shown < 0.1 and report.power_note(rows, "exact") == note  # the next smaller of 1, 2, 5, 10 points
    seeds = report.power_note(made({"base": 0.0, "DPO": 0.1}, seeds=(0, 1)), "exact")
    assert "between these very models" in seeds and "2 seeds, and only more of them, tell" in seeds
    assert "nothing can be said" in report.power_note(made({"base": 0.0, "DPO": 0.0}), "exact")


def test_no_table_shows_a_mean_without_its_interval():
    rows = made({"base": 0.0, "NFT": 0.1}).assign(event_count=1, event_relation="None")
    for table in (report.by_kind(rows, names=("exact",)), report.by_count_and_relation(rows, names=("exact",))):
        assert table[["low", "high"]].notna().all().all()
        assert report.with_intervals(table)["mean"].str.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]").all()
    shown = report.readable(report.headline_table(rows, names=("exact",)), ("exact",))
    assert list(shown.columns[5:]) == ["exact", "exact gain", "exact p", "exact effect"]
    assert shown.iloc[0, 6:].tolist() == ["–"] * 3 and shown["exact gain"][1].count("+") == 3
    known = pd.DataFrame({"clip": range(40), "kind": "true", "truth": [0, 1] * 20, "lalm": np.linspace(0, 1, 40)})
    curve = agreement.reliability_table(known, ["lalm"], bins=4, n=200)
    assert (curve["mean_score_low"] < curve["mean_score"]).all() and (curve["mean_score"] < curve["mean_score_high"]).all()
    seeds = report.headline_table(made({"base": 0.0, "NFT": 0.1}, seeds=(0, 1, 2)), names=("exact",))
    assert report.readable(seeds, ("exact",))["exact gain over seeds"][1].startswith("+0.")


class HalfCodec:
    """A sound is its own mel; decoding halves the clips with an odd number."""

    def encode(self, audio):
        return audio

    mel = encode

    def decode(self, latents, *, iterations):
        return latents * (1 - 0.5 * (torch.arange(len(latents)) % 2))[:, None]


class LoudJudge:
    """One event was asked: a clip of full level has it, a quieter one has another; the first of all is misheard."""

    def score(self, audio, records):
        right = ((audio.amax(1) == 1) & (torch.arange(len(audio)) > 0)).float()
        wrong = dict.fromkeys(("fp", "fn", "fp_real", "fn_real"), 1 - right)
        return dict.fromkeys(("tp", "exact", "order", "tp_real"), right) | wrong


def test_every_number_of_the_codec_table_has_its_interval():
    records = [{"id": f"c{i}", "kind": "single"} for i in range(40)]
    corpus = SimpleNamespace(records=records, waveforms=lambda positions: torch.ones(len(positions), 8))
    table = accuracy.codec_table(HalfCodec(), LoudJudge(), corpus, range(40), (2,), n=500).set_index("iterations")
    assert table.loc[2, ["mel_error", "exact", "event_f1"]].tolist() == pytest.approx([0.25, 19 / 40, 19 / 40])
    assert table.loc[2, "exact_kept"] == pytest.approx(19 / 39) and table.loc[0, ["exact_kept", "mel_error"]].tolist() == [1, 0]
    error = 1.96 * 0.25 / math.sqrt(40)
    assert table.loc[2, ["mel_error_low", "mel_error_high"]].tolist() == pytest.approx([0.25 - error, 0.25 + error], abs=0.015)
    for name in ("exact", "exact_kept", "event_f1", "event_f1_real"):
        assert table.loc[2, f"{name}_low"] < table.loc[2, name] < table.loc[2, f"{name}_high"]
    assert table.loc[2, ["exact_kept_low", "exact_kept_high"]].tolist() == pytest.approx([0.33, 0.64], abs=0.03)
    without = accuracy.codec_table(HalfCodec(), None, corpus, range(40), (2,), n=100)
    assert list(without.columns) == ["decode", "iterations", "clips", "mel_error", "mel_error_low", "mel_error_high"]


TABLE = pd.DataFrame(
    {
        "text": ["a | b * c", "<b>&\n_x_ event_f1", "[l](http://x) $1 50% #1 {~^} \\"],
        "n": [1, 20, 3],
        "value": [0.5, math.nan, 1.0],
        "missing": [None, "", "–"],
    }
)


def test_markdown_is_escaped():
    lines = report.to_markdown(TABLE).splitlines()
    assert lines[:2] == ["| text | n | value | missing |", "| --- | ---: | ---: | --- |"]
    assert lines[2] == r"| a \| b \* c | 1 | 0.500 | – |"
    assert lines[3] == r"| &lt;b&gt;&amp; \_x\_ event_f1 | 20 | – |  |"
    assert lines[4] == r"| [l]\(http://x) \$1 50% #1 {\~^} \\ | 3 | 1.000 | – |"


def test_latex_is_escaped():
    lines = report.to_latex(TABLE).splitlines()
    assert lines.pop(0) == r"% needs \usepackage{booktabs}"
    assert lines[:2] == [r"\begin{tabular}{lrrl}", r"\toprule"] and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert lines[2] == r"text & n & value & missing \\" and lines[3] == r"\midrule"
    assert lines[4] == r"a | b * c & 1 & 0.500 & -- \\"
    assert lines[5] == r"\textless{}b\textgreater{}\& \_x\_ event\_f1 & 20 & -- &  \\"
    end = r"\{\textasciitilde{}\textasciicircum{}\} \textbackslash{} & 3 & 1.000 & -- \\"
    assert lines[6] == r"{[}l{]}(http://x) \$1 50\% \#1 " + end


def test_a_run_keeps_its_tables_as_text(tmp_path, monkeypatch):
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path))
    run = runs.open_run(profile="tiny", seed=0)
    assert run.write_text("tta_headline.md", "| – |\n").read_bytes() == "| – |\n".encode()
    assert run.write_text("tta_headline.md", "x") == run.metrics / "tta_headline.md"


def version(results, rows, number, **config):
    """A version on disk: rows per seed where there are several."""
    folder = results / f"{number:04d}-tiny-{number:08x}"
    seeds = sorted(rows["seed"].unique())
    for seed in seeds:
        place = folder / f"seed{seed}" if len(seeds) > 1 else folder
        runs.write_table(place / "metrics", "tta_rows", rows[rows["seed"] == seed])
    content = {"status": "DONE", "profile": "tiny", "seeds": [int(s) for s in seeds], "config": {"grpo": config}}
    record.write_json(folder / "run.json", content | {"notebooks": {"06_tta_bench": {"seconds": 60.0 * number}}})
    return folder


def test_versions_with_the_same_clips_are_paired(tmp_path):
    old, new = made({"base": 0.0, "NFT": 0.05}), made({"base": 0.0, "NFT": 0.15})
    table = across.compare({"A": old, "B": new}, "exact").set_index("system")
    by_hand = new[new["system"] == "NFT"]["exact"].mean() - old[old["system"] == "NFT"]["exact"].mean()
    assert table.loc["NFT", "gain"] == pytest.approx(by_hand) and table.loc["NFT", "shown"] == 1
    assert table.loc["base", ["gain", "p", "shown"]].tolist() == [0, 1, 0] and table.loc["base", "gain_low"] > -0.02
    assert table.loc["NFT", "clips"] == "paired: 200 prompts, 1 seed"
    # three versions: all differences of a setting are corrected together
    three = across.compare({"A": old, "B": new, "C": new}, "exact").set_index(["version", "system"])
    assert three.loc[("B", "NFT"), "p_holm"] == pytest.approx(4 * three.loc[("B", "NFT"), "p"])


def test_versions_with_other_clips_are_not_paired():
    old, new = made({"base": 0.0}), made({"base": 0.3}, salt=1)
    other_noise = across.compare({"A": old, "B": new.assign(noise_seed=new["noise_seed"] + 1)}, "exact").iloc[0]
    assert other_noise["clips"] == "unpaired: 200 prompts, 1 seed against 200 prompts, 1 seed"
    sides = [table["exact"].to_numpy() for table in (new, old)]
    error = math.sqrt(sum(side.var(ddof=1) / 200 for side in sides))
    assert other_noise["gain"] == pytest.approx(sides[0].mean() - sides[1].mean())
    assert other_noise["gain_high"] - other_noise["gain_low"] == pytest.approx(2 * 1.96 * error, rel=0.08)
    other_prompts = across.compare({"A": old, "B": made({"base": 0.0}, prompts=100, first=500)}, "exact").iloc[0]
    assert other_prompts["clips"] == "unpaired: 100 prompts, 1 seed against 200 prompts, 1 seed"
    more = pd.concat([old, made({"base": 0.0}, prompts=300, first=300)], ignore_index=True)
    assert across.compare({"A": old, "B": more}, "exact")["clips"][0] == "paired: 200 prompts, 1 seed"
    best = [table.assign(system="best of 4", noise_seed=seed) for table, seed in ((old, 1), (old, 2))]
    assert across.compare(dict(zip("AB", best, strict=True)), "exact")["clips"][0].startswith("paired")
    with pytest.raises(ValueError, match="share no system"):
        across.compare({"A": old, "B": new.assign(setting="best guidance")}, "exact")


def test_results_compare_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path))
    first = version(tmp_path, made({"base": 0.0, "NFT": 0.05}, seeds=(0, 1, 2)), 1, steps=24)
    version(tmp_path, made({"base": 0.0, "NFT": 0.15}, seeds=(0, 1, 2)), 2, steps=60)
    version(tmp_path, made({"base": 0.0, "NFT": 0.15}, prompts=50, first=700), 3, steps=60)
    assert len(versions.read_rows(first)) == 1200
    assert cli.main(["results", "compare", "1", "0002", str(tmp_path / "0003-tiny-00000003")]) == 0
    out = capsys.readouterr().out
    assert "grpo.steps" in out and "24" in out and "paired: 200 prompts, 3 seeds" in out and "better" in out
    assert "unpaired: 50 prompts, 1 seed against 200 prompts, 3 seeds" in out and "exact, against 0001 (first)" in out
    assert "over seeds (t)" in out and "event_f1, against" in out and "aqa" not in out
    assert cli.main(["results", "1", "2"]) == 0 and "paired: 200 prompts" in capsys.readouterr().out
    assert cli.main(["results", "compare", "1", "2", "--markdown"]) == 0
    assert "| setting | system | version |" in capsys.readouterr().out
    assert cli.main(["results", "compare", "1", "2", "--latex"]) == 0
    assert r"\begin{tabular}{lllllllllll}" in capsys.readouterr().out
    bad = ((["compare", "1"], "two or more"), (["compare", "1", "0001"], "two or more"), (["1", "9"], "unknown version"))
    for words, message in bad:
        assert cli.main(["results", *words]) == 2
        assert message in capsys.readouterr().err


def test_other_parts_are_compared_by_their_own(tmp_path):
    rows = made({"base": 0.0, "NFT": 0.1}, prompts=60).assign(notes="")
    folders = [version(tmp_path, table, number) for number, table in ((1, rows), (2, rows))]
    for folder, value in zip(folders, (0.0, 1.0), strict=True):
        other = rows.assign(part="generalization", exact=value)
        runs.write_table(folder / "metrics", "tta_parts_rows", other)
    tables = dict(across.sections(folders))
    shown = next(table for title, table in tables.items() if title.startswith("exact")).set_index(["setting", "system"])
    apart = shown.xs(f"{rows['setting'][0]}, generalization")
    assert set(apart["shown"]) == {"better"} and set(shown.xs(rows["setting"][0])["shown"]) == {"–"}


def test_results_compare_without_benchmark_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESONATE_RESULTS", str(tmp_path))
    rows = made({"base": 0.0}, prompts=10)
    folders = [version(tmp_path, rows, number) for number in (1, 2, 3)]
    for number, folder in enumerate(folders[:2]):
        (folder / "metrics" / "tta_rows.csv").unlink()
        runs.write_table(folder / "metrics", "online_check", [{"system": "base", "exact": 0.25 * number}])
    assert cli.main(["results", "compare", "1", "2"]) == 0
    out = capsys.readouterr().out
    assert "exact_change" in out and "0.25" in out and "configuration that differs: none" in out
    assert cli.main(["results", "compare", "1", "2", "3"]) == 2
    assert "no benchmark rows" in capsys.readouterr().err
    # one seed of a version, or a scratch folder, has no run.json
    scratch = tmp_path / "scratch-tiny-seed0"
    runs.write_table(scratch / "metrics", "tta_rows", rows)
    assert cli.main(["results", "compare", "3", str(scratch)]) == 0
    assert "scratch-tiny-seed0 is not known (no run.json)" in capsys.readouterr().out


def test_over_seeds_gives_robustness_and_power(tmp_path):
    rows = made({"base": 0.0, "NFT": 0.1}, prompts=30, seeds=(0, 1)).assign(event_count=1, event_relation="None")
    for column in ("tp_real", "fp_real", "fn_real"):
        rows[column] = 0.0
    folder = version(tmp_path, rows, 1)
    for seed in (0, 1):
        mine = rows[rows["seed"] == seed].assign(perturbation_type="space", notes="")
        parts = [mine.assign(part=part) for part in ("robustness", "clean")]
        runs.write_table(folder / f"seed{seed}" / "metrics", "tta_parts_rows", pd.concat(parts))
    tables, said, main = suite.over_seeds(folder, n=200)
    assert main == "exact"
    ratio = tables["tta_robustness_ratio"]
    assert ratio[ratio["metric"] == "exact_ratio"][["low", "high"]].eq(1).all().all()  # perturbed and clean alike
    assert (ratio["seeds"] == 2).all() and "With these 30 prompts a difference of" in said
    headline = runs.write_table(tmp_path, "headline", tables["tta_headline"])
    assert json.loads((tmp_path / "headline.json").read_text())[0]["exact_p"] is None
    assert "exact" in report.readable(headline, ("exact",)) and metrics.HEADLINE[0] == "exact"
