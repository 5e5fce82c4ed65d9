"""The benchmark on a fake generator whose sound tells its seed: pairing, best of k, tables, words, known scores."""

import json
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from resonate_lib.config import DataConfig, EvalConfig, resolve
from resonate_lib.data import prompts
from resonate_lib.evaluation import parts, ttabench, worlds

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000
RECORDS = [
    {
        "id": f"prompt_{i:04}",
        "prompt_text": f"text {i}",
        "event_count": 1 + i % 2,
        "event_relation": "sequence" if i % 2 else None,
        "part": "accuracy",
        "kind": "followed by" if i % 2 else "single",
        "heldout": True,
    }
    for i in range(10)
]


class FakeGenerator:
    """Latents are uniform numbers of the seed; the network shifts them; sound is a sine of that amplitude."""

    sample_rate = RATE

    def __init__(self):
        self.network = 0.0
        self.calls = []

    def generate(self, prompts, *, steps, guidance_scale, seeds):
        self.calls.append(list(seeds))
        draws = [torch.rand(1, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.cat(draws) + self.network

    def decode(self, latents, *, iterations, limit=True):
        return 0.4 * latents[:, None] * torch.sin(torch.arange(RATE // 2) * 0.3)


def amplitude(audio):
    return audio.abs().amax(1) / 0.4


def reward(audio, sample_rate, prompts, metadata=None):
    assert sample_rate == RATE and len(prompts) == len(metadata) == len(audio)
    return SimpleNamespace(scores=amplitude(audio))


class FakeJudge:
    def score(self, audio, metadata):
        right = amplitude(audio) > 0.5
        order = torch.tensor([1.0 if r["event_relation"] == "sequence" else math.nan for r in metadata])
        zero = torch.zeros(len(audio))
        return {
            "tp": right.float(), "fp": zero, "fn": 1 - right.float(), "exact": right.float(), "order": order,
            "tp_real": zero, "fp_real": zero, "fn_real": zero,
        }  # fmt: skip


SCORERS = {"judge": FakeJudge(), "reward": reward}


def run(**options):
    return ttabench.evaluate(FakeGenerator(), RECORDS, SCORERS, **options)


def test_rows_have_the_fixed_columns_and_the_fields_of_the_prompt():
    rows = run(samples_per_prompt=2, label="base", guidance_scale=3)
    assert list(rows.columns) == list(ttabench.COLUMNS) and len(rows) == 20
    assert rows["setting"].unique().tolist() == ["guidance 3"] and set(rows["system"]) == {"base"}
    assert rows["event_relation"].tolist()[:4] == ["None", "None", "sequence", "sequence"]
    assert rows["sample"].tolist()[:4] == [0, 1, 0, 1] and rows["aqa"].isna().all()
    assert rows["order"].isna().sum() == 10 and rows["heldout"].all() and not rows["silent"].any()


def test_a_clip_does_not_depend_on_batch_system_or_other_prompts():
    whole, small = run(batch_size=32), run(batch_size=3)
    pd.testing.assert_frame_equal(whole, small)
    alone = ttabench.evaluate(FakeGenerator(), RECORDS[4:5], SCORERS)
    assert alone["reward"].item() == whole["reward"][4]
    tuned = run(network=0.25, label="NFT")
    assert tuned["noise_seed"].tolist() == whole["noise_seed"].tolist()
    assert np.allclose(tuned["reward"] - whole["reward"], 0.25, atol=1e-3)
    assert run(seed=1)["noise_seed"].tolist() != whole["noise_seed"].tolist()
    assert whole["noise_seed"].nunique() == 10


def test_noise_seed_is_stable():
    assert ttabench.noise_seed(0, "prompt_0001", 0) == 1544349124  # results already published depend on it
    assert len({ttabench.noise_seed(s, p, k) for s in (0, 1) for p in ("a", "b") for k in (0, 1)}) == 8


def test_network_is_put_back_even_after_an_error():
    generator = FakeGenerator()
    ttabench.evaluate(generator, RECORDS, SCORERS, network=0.5)
    assert generator.network == 0.0
    with pytest.raises(ZeroDivisionError):
        ttabench.evaluate(generator, RECORDS, {"reward": lambda *_: 1 / 0}, network=0.5)
    assert generator.network == 0.0


def test_best_of_k_takes_the_highest_reward_and_holds_the_plain_sample():
    plain, best = run(samples_per_prompt=2), run(samples_per_prompt=2, best_of=4, batch_size=6)
    assert len(best) == 20 and (best["reward"] >= plain["reward"]).all() and (best["reward"] > plain["reward"]).any()
    candidates = FakeGenerator()
    ttabench.evaluate(candidates, RECORDS[:1], SCORERS, best_of=4)
    assert len(candidates.calls[0]) == 4 and candidates.calls[0][0] == ttabench.noise_seed(0, "prompt_0000", 0)
    values = [torch.rand(1, generator=torch.Generator().manual_seed(s)).item() for s in candidates.calls[0]]
    row = ttabench.evaluate(FakeGenerator(), RECORDS[:1], SCORERS, best_of=4)
    assert row["reward"].item() == pytest.approx(max(values), abs=1e-3)
    assert row["noise_seed"].item() == candidates.calls[0][int(np.argmax(values))]


def test_bad_calls_name_the_fix():
    generator = FakeGenerator()
    cases = [
        ("no prompt records", dict(records=[])),
        ("prompt_0000.* occurs twice", dict(records=[RECORDS[0], RECORDS[0]])),
        ("must be 1 or more", dict(best_of=0)),
        ("best_of needs a reward", dict(best_of=2, select="aqa")),
        ("best_of needs a reward", dict(best_of=2, select="judge")),
        ("one per clip", dict(scorers={"clap": lambda *_: SimpleNamespace(scores=torch.zeros(3))})),
        ("which another column holds", dict(scorers={"a": FakeJudge(), "b": FakeJudge()})),
    ]
    for message, change in cases:
        options = {"records": RECORDS, "scorers": SCORERS} | change
        with pytest.raises(ValueError, match=message):
            ttabench.evaluate(generator, options.pop("records"), options.pop("scorers"), **options)
    with pytest.raises(ValueError, match="1 clips for 10 records"):
        ttabench.score_clips(torch.zeros(1, 8000), RECORDS, SCORERS, sample_rate=RATE)


def test_originals_are_scored_in_the_same_columns():
    loud = 0.4 * torch.sin(torch.arange(8000) * 0.3).repeat(10, 1)
    rows = ttabench.score_clips(loud, RECORDS, SCORERS, sample_rate=RATE)
    assert list(rows.columns) == list(ttabench.COLUMNS) and rows["exact"].eq(1).all()
    assert set(rows["system"]) == set(rows["setting"]) == {"originals"}
    table = ttabench.headline_table(pd.concat([run(), rows]), n=50)
    assert table["system"].tolist() == ["base", "originals"] and table["exact_gain"].isna().all()


def test_best_guidance_reads_the_metric():
    class Guided(FakeGenerator):
        def generate(self, prompts, *, steps, guidance_scale, seeds):
            return super().generate(prompts, steps=steps, guidance_scale=1, seeds=seeds) + 0.3 * (guidance_scale == 2)

    scale, rows = ttabench.best_guidance(Guided(), RECORDS, SCORERS, (3, 1, 2))
    assert scale == 2 and len(rows) == 30


def made(gains, prompts=200, seeds=(0, 1, 2), setting="guidance 1"):
    """Rows of systems whose exact match is base plus so many right answers, on prompts of mixed difficulty."""
    rng = np.random.default_rng(0)
    tables = []
    for seed in seeds:
        luck = rng.random(prompts)
        for system, gain in gains.items():
            table = pd.DataFrame(
                {"id": [f"p{i:03}" for i in range(prompts)], "exact": (luck < 0.5 + gain).astype(float)}
            )
            tables.append(
                table.assign(system=system, seed=seed, setting=setting, sample=0, guidance=1.0, kind="single")
            )
    return pd.concat(tables, ignore_index=True)


def test_headline_table_pairs_with_base():
    rows = made({"base": 0.0, "NFT": 0.1})
    table = ttabench.headline_table(rows, names=("exact",)).set_index("system")
    assert table.loc["NFT", "exact_gain"] == pytest.approx(table.loc["NFT", "exact"] - table.loc["base", "exact"])
    width = table.loc["NFT", "exact_gain_high"] - table.loc["NFT", "exact_gain_low"]
    assert width < table.loc["NFT", "exact_high"] - table.loc["NFT", "exact_low"]
    assert table.loc["base", ["prompts", "clips", "seeds"]].tolist() == [200, 600, 3]
    shown = ttabench.readable(table.reset_index(), ("exact",))
    assert shown["exact gain"][0] == "–" and shown["exact gain"][1].startswith("+0.1")
    with pytest.raises(ValueError, match="share 0 clips"):
        ttabench.paired(rows, "NFT", "DPO")
    with pytest.raises(ValueError, match="two rows"):
        ttabench.paired(pd.concat([rows, rows]), "NFT", "base")


def test_words_follow_the_intervals():
    names = {"base": 0.0, "base trained on": 0.0, "best of 4": 0.15, "DPO": 0.05, "GRPO (CLAP)": 0.15, "NFT": 0.25}
    text = ttabench.words(made(names))
    assert "So online beats offline here." in text and "NFT beats base: +2" in text
    assert "base trained on is not shown to differ from base: +0.0" in text and "best of 4 beats base" in text
    assert "GRPO (LALM)" not in text and "200 prompts, 3 seeds" in text
    same = ttabench.words(made({"base": 0.0, "DPO": 0.1, "NFT": 0.1}))
    assert "do not show that online beats offline" in same
    worse = ttabench.words(made({"base": 0.0, "DPO": 0.2, "NFT": 0.05}, seeds=(0,)))
    assert "NFT falls behind DPO" in worse and "does not beat offline" in worse and "1 seed," in worse
    mixed = ttabench.words(made({"base": 0.0, "DPO": 0.1, "GRPO (CLAP)": 0.3, "NFT": -0.1}))
    assert "in 1 of 2 comparisons and falls behind in 1" in mixed
    assert "nothing can be compared" in ttabench.words(made({"NFT": 0.0}))
    both = pd.concat([made({"base": 0, "NFT": 0.2}), made({"base": 0, "NFT": 0.2}, setting="best guidance")])
    assert len(ttabench.words(both).split("\n\n")) == 2


def test_breakdowns():
    rows = pd.concat([run(), run(network=0.2, label="NFT")])
    table = ttabench.by_count_and_relation(rows)
    assert set(zip(table["event_count"], table["event_relation"], strict=True)) == {(1, "None"), (2, "sequence")}
    assert set(ttabench.by_kind(rows)["kind"]) == {"single", "followed by"}


@pytest.mark.parametrize(
    ("values", "score"),
    [
        ([5.1, 4.8], 5.8823529411764675),
        ([5.0, 4.5, 4.0, 3.0], 23.240740740740744),
        ([6.0, 6.0, 6.0], 0.0),
        ([3.0], 0.0),
        ([0.0, 0.0], 0.0),
        ([2.0, 0.0], 100.0),
        ([4.62, 5.18, 4.9], 7.310167310167305),
    ],
)
def test_fairness_as_the_benchmark_computes_it(values, score):
    assert ttabench.fairness_score(values) == pytest.approx(score)


def test_robustness():
    assert ttabench.robustness_score(3.0, 4.0) == 0.75
    assert ttabench.robustness_score([2.0, 4.0], [4.0, 4.0]) == 0.75
    assert math.isnan(ttabench.robustness_score(1.0, 0.0))


def published() -> Path:
    folder = Path(os.environ.get("RESONATE_TTA_BENCH", ROOT / ".." / "shared" / "prompts" / "tta_bench")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no TTA-Bench prompts in {folder}: set RESONATE_TTA_BENCH")
    return folder


def load_all(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prompts.load_all(folder)


def test_all_2999_prompts_pass_the_schema_unaltered():
    folder = published()
    with pytest.warns(UserWarning, match="event_count differs from event_list in 5 records"):
        found = prompts.load_all(folder)
    assert {part: len(records) for part, records in found.items()} == {
        "accuracy": 1500, "generalization": 300, "robustness": 300, "fairness": 299, "bias": 300, "toxicity": 300,
    }  # fmt: skip
    for part, records in found.items():
        assert records == json.loads((folder / prompts.TTA_BENCH_FILES[part]).read_text(encoding="utf-8"))
        assert all(prompts.part_of(record) == part for record in records)
    ids = {record["id"] for records in found.values() for record in records}
    assert ids == {f"prompt_{n:04}" for n in range(1, 3001)} - {"prompt_2325"}
    groups = Counter((record["event_count"], record["event_relation"]) for record in found["accuracy"])
    assert sorted(groups.values(), reverse=True) == sorted((280, 250, 164, 150, 126, 67, 92, 73, 76, 54, 54, 114), reverse=True)
    assert groups[1, "None"] == 280 and groups[5, "complex"] == 114 and groups[3, "complex"] == 67


def test_paper_asks_the_whole_benchmark_and_small_a_fifth():
    for profile, asked in (("paper", 2999), ("small", 600)):
        config, folder = resolve(EvalConfig, profile), published()
        world = worlds.FolderWorld(DataConfig(folder="x", captions="y"), sample_rate=16000, seconds=4, tta_bench=str(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts = {part: config.prompts if part == "accuracy" else config.part_prompts for part in prompts.TTA_BENCH_FILES}
            found = [record["id"] for part, count in counts.items() for record in world.bench(part, count=count)]
        assert len(found) == len(set(found)) == asked


def test_every_robustness_prompt_has_its_unperturbed_one_among_the_accuracy_prompts():
    """The number in `notes` is right: but for case, spaces and marks the texts of these perturbations are the originals'."""
    found = load_all(published())
    clean = prompts.unperturbed(found["robustness"], found["accuracy"])
    assert [record["id"] for record in clean] == [record["id"] for record in found["robustness"]]
    assert {record["part"] for record in clean} == {"clean"} and len({record["prompt_text"] for record in clean}) == 50

    def letters(record):
        return "".join(c for c in record["prompt_text"].lower() if c.isalpha())

    for record, original in zip(found["robustness"], clean, strict=True):
        kind = record["perturbation_type"]
        if kind in ("uppercase", "space"):
            assert letters(record) == letters(original)
        elif kind == "misspelling":
            assert abs(len(letters(record)) - len(letters(original))) <= 1
    assert prompts.unperturbed(found["robustness"]) == [] and prompts.unperturbed(found["fairness"], found["accuracy"]) == []
    own = [{"id": "robustness_test_0000", "prompt_text": "a  dog", "unperturbed": "a dog", "part": "robustness", "notes": None}]
    assert prompts.unperturbed(own) == [{**own[0], "prompt_text": "a dog", "part": "clean"}]


FAULTS = {
    r"acc_prompt\.json, record 7 \(prompt_9999\): allowed ids of accuracy are prompt_0001 to": ("accuracy", "id", "prompt_9999"),
    r"record 7 \(7\): allowed ids": ("accuracy", "id", 7),
    r"record 7 \(prompt_0001\): this id occurs twice": ("accuracy", "id", "prompt_0001"),
    r"without prompt_2325": ("fairness", "id", "prompt_2325"),
    r"\(prompt_0007\): prompt_text is ' '; it must hold a text": ("accuracy", "prompt_text", " "),
    r"event_count is '2'; it must hold one of 1, 2, 3, 4, 5": ("accuracy", "event_count", "2"),
    r"event_count is True": ("accuracy", "event_count", True),
    r"event_list is \['dog', 3\]; it must hold a list of texts": ("accuracy", "event_list", ["dog", 3]),
    r"event_relation is None; it must hold one of None, parallelism": ("accuracy", "event_relation", None),
    r"notes is 'kitchen'; it must hold a text of the form scene": ("accuracy", "notes", "kitchen"),
    r"no field 'event_count'": ("generalization", "event_count", ...),
    r"notes is 'x'; it must hold null": ("generalization", "notes", "x"),
    r"perturbation_type is 'lowercase'; it must hold one of uppercase": ("robustness", "perturbation_type", "lowercase"),
    r"49 prompts of perturbation_type uppercase; the benchmark has 50": ("robustness", "perturbation_type", "space"),
    r"notes is 'robot'; it must hold one of male": ("fairness", "notes", "robot"),
    r"Fairness_type is 'height'; it must hold language": ("fairness", "Fairness_type", "height"),
    r"notes is 'who knows'": ("bias", "notes", "who knows"),
    r"categories is \['rude'\]; it must hold a list of hate": ("toxicity", "categories", ["rude"]),
    r"categories is 'hate'; it must hold a list": ("toxicity", "categories", "hate"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_planted_fault_is_named(message):
    part, field, value = FAULTS[message]
    path = published() / prompts.TTA_BENCH_FILES[part]
    records = json.loads(path.read_text(encoding="utf-8"))
    records[6] = {key: v for key, v in records[6].items() if key != field} | ({} if value is ... else {field: value})
    with pytest.raises(ValueError, match=message):
        prompts.check_schema(records, part)


def test_missing_prompts_and_strange_files_are_named(tmp_path):
    records = load_all(published())["bias"]
    prompts.check_schema([{**record, "more": 1} for record in records], "bias")  # keys beyond the schema pass
    with pytest.raises(ValueError, match=r"bias_prompt\.json: 2 of 300 prompts are missing, such as prompt_2699"):
        prompts.check_schema(records[:-2], "bias")
    strange = {'{"a": 1}': "holds a dict, not a list", '["prompt"]': "record 1: needs `id` and `prompt_text`, has 'prompt'"}
    for text, message in strange.items():
        (tmp_path / "bias_prompt.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            prompts.load_tta_bench(tmp_path, "bias")


def test_rows_hold_what_the_parts_are_grouped_by():
    records = [
        {"id": "prompt_1801", "prompt_text": "x", "perturbation_type": "uppercase", "notes": "8"},
        {"id": "prompt_2101", "prompt_text": "x", "notes": "male"},
        {"id": "prompt_2701", "prompt_text": "x", "notes": "source_prompt:x", "categories": ["hate", "shocking"]},
        {"id": "own", "prompt_text": "x", "notes": None},
    ]
    rows = ttabench.score_clips(torch.zeros(4, 8000), records, {}, sample_rate=RATE)
    assert rows["part"].tolist() == ["robustness", "fairness", "toxicity", ""]
    assert rows["perturbation_type"].tolist() == ["uppercase", "", "", ""] and rows["notes"].tolist()[:2] == ["8", "male"]
    assert rows["categories"].tolist() == ["", "", "hate; shocking", ""] and rows["notes"][3] == ""


def test_perturbed_and_clean_prompts_get_the_same_noise():
    """A generator that hears nothing but its noise loses nothing by a misspelt prompt: every ratio is 1, without any width."""
    perturbed = prompts.embedded_bench("robustness", count=16)
    clean = prompts.unperturbed(perturbed)
    assert [r["prompt_text"] for r in clean] == [r["unperturbed"] for r in perturbed]
    rows = [ttabench.evaluate(FakeGenerator(), records, {"reward": reward}) for records in (perturbed, clean)]
    table = parts.robustness(pd.concat(rows), "reward", n=50)
    assert table["perturbation_type"].tolist() == ["uppercase", "misspelling", "space", "punctuate", "overall"]
    assert np.allclose(table[["mean", "low", "high"]], 1) and table["n"].tolist() == [4, 4, 4, 4, 16]
