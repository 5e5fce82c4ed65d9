"""Fine-grained AQA: what is asked, how the answers become a score, that a shared clip changes nothing, and what is taught."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from resonate_lib import runs
from resonate_lib.data import prompts, scenes
from resonate_lib.data.corpus import Corpus
from resonate_lib.evaluation import ttabench
from resonate_lib.rewards import RewardResult, base, load_reward
from resonate_lib.rewards.fine import FineColumns, FineLalm, events_of, questions
from resonate_lib.rewards.lalm import QUESTION, LalmReward, LalmShape
from resonate_lib.rewards.lalm_training import draw_questions, fit_lalm, one_part
from resonate_lib.rewards.packing import Tree, pack

RATE = 16000
ONLY = " Please only answer yes or no, without other explanations."
TTA = Path(__file__).resolve().parents[2] / "shared" / "prompts" / "tta_bench"


@pytest.fixture(scope="module")
def small():
    return LalmReward.load(base.SHIPPED / "lalm")


@pytest.fixture(scope="module")
def made():
    """Four prompts over the embedded world and a scene of each."""
    records = prompts.embedded_bench(count=4, seed=3)
    rngs = [np.random.default_rng(i) for i in range(4)]
    waves = [scenes.render(scenes.Spec.of(record), rng)[0] for record, rng in zip(records, rngs, strict=True)]
    return torch.from_numpy(np.stack(waves)), records


class Told:
    """A judge that knows its answers: question -> score; it notes what it is asked."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def ask(self, audio, sample_rate, asked, clips=None):
        self.asked = list(zip(clips, asked, strict=True))
        scores = torch.tensor([self.answers[question] for question in asked])
        return RewardResult(scores, {"p_yes_mass": torch.linspace(0.5, 1.0, len(asked))})


# What is asked


def test_questions_of_the_benchmarks_records():
    record = {"id": "prompt_1", "event_list": ["Train horn", "HVAC hum"], "event_relation": "sequence"}
    each = [("event", f"Does this audio contain the sound of {name}?{ONLY}") for name in record["event_list"]]
    ordered = f"Do these sounds occur one after another in this order: Train horn, then HVAC hum?{ONLY}"
    assert questions(record, "x") == [*each, ("relation", ordered)]
    three = record | {"event_list": ["a", "b", "c"], "event_relation": "parallelism"}
    assert questions(three, "x")[-1] == ("relation", f"Do these sounds occur at the same time: a, b and c?{ONLY}")
    _, asked = questions(three | {"event_relation": "complex"}, "A, then b while c {event}.")[-1]
    assert "follow one another and overlap as described by the text: A, then b while c {event}.?" in asked
    for none in ("None", None, ""):
        assert questions(record | {"event_relation": none}, "x") == each
    assert len(questions({"event_list": ["a"], "event_relation": "sequence"}, "x")) == 1


def test_questions_of_the_embedded_world_ask_counts_where_something_can_be_counted():
    spec = scenes.Spec((("dog", 3), ("rain", 1), ("beep", 1)), "followed by")
    record = prompts.prompt_record(spec, "…", "one")
    assert record["event_list"][0] == "dog x3"
    texts = [text.removesuffix(ONLY) for _, text in questions(record, "…")]
    assert texts == [
        *(f"Does this audio contain the sound of {name}?" for name in ("dog", "rain", "beep")),
        "Does dog sound exactly three times in this audio?",
        "Does beep sound exactly once in this audio?",
        "Do these sounds occur one after another in this order: dog, then rain, then beep?",
    ]
    listed = {key: value for key, value in record.items() if key not in ("groups", "relation")}
    assert questions(listed, "…") == questions(record, "…")  # the list alone says as much
    assert events_of({"event_list": ["door x12", "x2", "box xx3"]}) == [("door", 12), ("x2", 1), ("box xx3", 1)]
    together = prompts.prompt_record(scenes.Spec((("rain", 1), ("cow", 1)), "while"), "…", "two")
    assert questions(together, "…")[-1][1].startswith("Do these sounds occur at the same time: rain and cow?")


def test_every_accuracy_prompt_of_the_benchmark_can_be_asked():
    path = TTA / "acc_prompt.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    relations = {"complex": "as described by the text", "sequence": "in this order", "parallelism": "at the same time"}
    for record in json.loads(path.read_text()):
        asked = questions(record, record["prompt_text"])
        assert sum(part == "event" for part, _ in asked) == len(record["event_list"])
        assert not any(part == "count" for part, _ in asked) or any(name in scenes.COUNTABLE for name in record["event_list"])
        told = [text for part, text in asked if part == "relation"]
        several = len(record["event_list"]) > 1 and record["event_relation"] != "None"
        assert len(told) == several and (not several or relations[record["event_relation"]] in told[0])


@pytest.mark.parametrize("record", [{"id": "p7"}, {"id": "p7", "event_list": []}, {"id": "p7", "event_list": "dog, cat"},
                                    {"id": "p7", "event_list": ["dog", ""]}])
def test_records_without_events_are_refused_in_one_line(record):
    with pytest.raises(ValueError, match=r"'p7' has event_list=.*use the reward lalm") as caught:
        FineLalm(Told({}))(torch.zeros(1, 8), RATE, ["a"], [record])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'lalm_fine' got no prompt records"):
        FineLalm(Told({}))(torch.zeros(1, 8), RATE, ["a"])


# How answers become a score


def test_the_score_and_its_parts_by_hand():
    two = {"groups": [["dog", 2], ["rain", 1]], "relation": "while"}
    one = {"event_list": ["wind"], "event_relation": "None"}
    answers = dict(zip([text for _, text in questions(two, "")], (0.9, 0.5, 0.8, 0.4), strict=True))
    judge = Told(answers | {questions(one, "")[0][1]: 0.3})
    result = base.check_result(FineLalm(judge)(torch.zeros(2, 8), RATE, ["x", "y"], [two, one]), 2)
    assert [clip for clip, _ in judge.asked] == [0, 0, 0, 0, 1]
    assert result.scores.tolist() == pytest.approx([(0.9 * 0.5 * 0.8 * 0.4) ** 0.25, 0.3])
    parts = {name: part.tolist() for name, part in result.parts.items()}
    assert parts["event_mean"] == pytest.approx([0.7, 0.3]) and parts["event_min"] == pytest.approx([0.5, 0.3])
    assert parts["count"][0] == pytest.approx(0.8) and parts["relation"][0] == pytest.approx(0.4)
    assert np.isnan(parts["count"][1]) and np.isnan(parts["relation"][1])
    assert parts["questions"] == [4, 1] and parts["p_yes_mass"] == pytest.approx([0.6875, 1.0])
    judge.answers = dict.fromkeys(judge.answers, 0.0)
    assert torch.isfinite(FineLalm(judge)(torch.zeros(2, 8), RATE, ["x", "y"], [two, one]).scores).all()


def test_columns_of_the_benchmarks_rows_are_nan_where_no_events_are_listed():
    record = {"id": "1", "prompt_text": "wind", "event_list": ["wind", "sea"], "event_relation": "sequence"}
    asked = [text for _, text in questions(record, "wind")]
    judge = Told(dict(zip(asked, (0.5, 0.7, 0.2), strict=True)))
    records = [{"id": "0", "prompt_text": "a"}, record]
    rows = ttabench.score_clips(torch.zeros(2, RATE), records, {"fine": FineColumns(judge, RATE)}, sample_rate=RATE)
    assert rows["fine"].isna().tolist() == [True, False]
    assert rows[["fine", "fine_events", "fine_relation"]].iloc[1].tolist() == pytest.approx([0.07 ** (1 / 3), 0.6, 0.2])
    rows = ttabench.score_clips(torch.zeros(1, RATE), records[:1], {"fine": FineColumns(judge, RATE)}, sample_rate=RATE)
    assert rows["fine"].isna().all()


# The judge is asked


def test_the_small_judges_published_question_is_a_question_like_any_other(small, made):
    audio, records = made
    captions = [record["prompt_text"] for record in records]
    called, asked = small(audio, RATE, captions), small.ask(audio, RATE, [QUESTION.format(caption=c) for c in captions])
    assert torch.equal(called.scores, asked.scores) and torch.equal(called.parts["p_yes_mass"], asked.parts["p_yes_mass"])
    chance = small.answer_logits(audio, RATE, captions).softmax(-1)
    yes, no = chance[:, small.yes].sum(-1), chance[:, small.no].sum(-1)
    torch.testing.assert_close(called.scores, yes / (yes + no), atol=1e-6, rtol=0)


def test_a_clip_heard_once_for_all_its_questions_scores_as_if_heard_for_each(small, made, monkeypatch):
    audio, records = made
    asked = [(row, text) for row, record in enumerate(records) for _, text in questions(record, "")]
    asked += [(2, QUESTION.format(caption=records[2]["prompt_text"])), (0, asked[0][1])]
    of, texts = [row for row, _ in asked], [text for _, text in asked]
    apart = small.ask(audio[of], RATE, texts).parts["logit"]
    heard, tower = [], small.model.model.audio_tower
    hook = tower.register_forward_hook(lambda _, inputs, out: heard.append(len(out.last_hidden_state)))
    try:
        together = small.ask(audio, RATE, texts, clips=of).parts["logit"]
        assert heard == [4]
        monkeypatch.setattr(small, "batch_size", 3)
        parted = small.ask(audio, RATE, texts, clips=of).parts["logit"]
    finally:
        hook.remove()
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=0)
    torch.testing.assert_close(parted, apart, atol=2e-4, rtol=0)
    for wrong in ([0] * (len(texts) - 1), [4, *of[1:]], [-1, *of[1:]]):
        with pytest.raises(ValueError, match=rf"{len(texts)} questions about 4 clips"):
            small.ask(audio, RATE, texts, clips=wrong)


def test_load_reward_knows_the_fine_reward_and_mixes_it_on_one_model(small, made):
    audio, records = made
    captions = [record["prompt_text"] for record in records]
    mix = load_reward("0.5*lalm+0.5*lalm_fine")
    whole, fine = (reward.reward for _, _, reward in mix.reward.terms)
    assert fine.judge is whole
    result = mix(audio, RATE, captions, records)
    torch.testing.assert_close(result.scores, 0.5 * small(audio, RATE, captions).scores + 0.5 * result.parts["lalm_fine"])
    assert {"lalm_fine/event_min", "lalm_fine/relation", "lalm/logit"} <= set(result.parts)
    alone = load_reward("lalm_fine", lalm=small)(audio, RATE, captions, records)
    torch.testing.assert_close(alone.scores, result.parts["lalm_fine"])
    with pytest.raises(ValueError, match="nearest: 'lalm_fine'"):
        load_reward("lalm_fin")


def test_a_run_gives_the_fine_reward_its_own_judge(tmp_path):
    run = runs.open_run(tmp_path / "run", profile="smoke", seed=0)
    mix = run.reward("0.5*lalm+0.5*lalm_fine")
    assert mix.reward.terms[1][2].reward.judge is run.scorer("lalm")
    assert run.reward("lalm_fine").reward.judge is run.scorer("lalm")


# Rows as trees


def test_a_tree_holds_what_sequences_share_once_and_sees_ancestors_alone():
    tree = Tree([7, 8])
    assert tree.add([1, 2, 3]) == [2, 3, 4] and tree.add([1, 2, 4]) == [2, 3, 5] and tree.add([2]) == [6]
    assert tree.add([1, 2, 3]) == [2, 3, 4] and tree.ids == [7, 8, 1, 2, 3, 4, 2]
    other = Tree([7, 8])
    other.add([9])
    packed = pack([tree, other], 0, [(0, 5), (1, 2)])
    assert packed.ids.shape == (2, 32) and packed.ids[:, :7].tolist() == [[7, 8, 1, 2, 3, 4, 2], [7, 8, 9, 0, 0, 0, 0]]
    assert not packed.ids[:, 7:].any()
    assert packed.positions[0, :7].tolist() == [0, 1, 2, 3, 4, 4, 2] and packed.positions[1, :3].tolist() == [0, 1, 2]
    sees = {place: mask.nonzero().flatten().tolist() for place, mask in enumerate(packed.mask[0, 0, :7])}
    assert sees == {0: [0], 1: [0, 1], 2: [0, 1, 2], 3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4], 5: [0, 1, 2, 3, 5], 6: [0, 1, 6]}
    assert packed.mask.any(-1).all() and (packed.rows.tolist(), packed.columns.tolist()) == ([0, 1], [5, 2])


# What is taught


def truth(question, spec):
    """Whether the answer is yes, read from the words and the spec."""
    counts = dict(spec.groups)
    if found := re.match(r"Does this audio contain the sound of (.+)\?", question):
        return found[1] in counts
    if found := re.match(r"Does (.+) sound exactly (once|twice|three times) in", question):
        return counts.get(found[1]) == {"once": 1, "twice": 2, "three times": 3}[found[2]]
    order = re.match(r"Do these sounds occur one after another in this order: (.+)\?", question)
    if order:
        return spec.relation == "followed by" and tuple(order[1].split(", then ")) == spec.names
    same = re.match(r"Do these sounds occur at the same time: (.+)\?", question)
    return spec.relation == "while" and set(re.split(", | and ", same[1])) == set(spec.names)


def test_fine_questions_are_answered_rightly_and_half_of_them_with_yes():
    rng, counted, asked_names = np.random.default_rng(0), {}, set()
    for _ in range(1500):
        spec = scenes.sample_spec(rng, "train")
        record = {"groups": spec.groups, "relation": spec.relation, "split": "train"}
        for part, question, yes in draw_questions(record, rng):
            assert truth(question, spec) is yes, (question, spec)
            form = re.search("exactly .*? in|in this order|at the same time|the sound of", question)[0]
            counted.setdefault((part, form), []).append(yes)
            names = [name for name in scenes.CLASSES if re.search(rf"\b{name}\b", question.split("?")[0])]
            asked_names |= {(name, yes) for name in names}
            if "in this order" in question and not yes:
                listed = question.split(": ")[1].split("?")[0].split(", then ")
                wrong = scenes.Spec(tuple((name, 1) for name in listed), "followed by")
                assert scenes.combination_split(wrong) == "train"
    assert len(counted) == 6  # events, three numbers, two relations
    assert all(0.3 < np.mean(answers) < 0.7 for answers in counted.values()), {k: np.mean(v) for k, v in counted.items()}
    assert len(asked_names) == 2 * len(scenes.CLASSES)  # every event sounds and is absent


def test_one_part_is_a_true_and_a_false_question_of_one_kind():
    asked = [("event", "a", True), ("event", "b", False), ("count", "c", True), ("count", "d", False)]
    drawn = [tuple(one_part(asked, np.random.default_rng(i))) for i in range(40)]
    assert set(drawn) == {(("a", True), ("b", False)), (("c", True), ("d", False))}


def test_the_small_judge_learns_all_forms_at_once():
    corpus = Corpus.from_scenes(6, seed=1, workers=1)
    shape = LalmShape(width=32, heads=2, audio_layers=1, text_layers=1)
    texts = [record["caption"] for record in corpus.records]
    judge, history = fit_lalm(corpus, steps=3, batch_size=4, seed=0, warmup_steps=1, shape=shape, texts=texts)
    assert judge.card["questions"] == ["caption", "event", "count", "relation"]
    assert "fine" not in history[0] and history[1]["fine"] > 0 and 0 <= history[2]["fine_no_right"] <= 1
    words = ("exactly", "three times", "busy signal", "at the same time", "in this order")
    encode, decode = judge.processor.tokenizer.encode, judge.processor.tokenizer.decode
    for word in words:
        assert [decode([i]) for i in encode(" " + word)] == [" " + part for part in word.split()]
