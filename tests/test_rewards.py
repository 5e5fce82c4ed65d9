"""Rewards: the contract, mixes and user functions, and both reward models at a toy size (accuracy is measured elsewhere)."""

import copy
import math
import zlib

import pytest
import torch

from resonate_lib.evaluation.accuracy import recall_hits
from resonate_lib.models.flux_audio import Condition
from resonate_lib.rewards import Checked, RewardResult, WeightedMix, check_result, lalm_training, load_reward
from resonate_lib.rewards import lalm as lalm_module
from resonate_lib.rewards.clap import ClapConfig, ClapReward, SmallCLAP, fit_clap, info_nce
from resonate_lib.rewards.lalm import (
    QUESTION,
    LalmReward,
    LalmShape,
    PromptFrame,
    answer_ids,
    build_model,
    build_processor,
    log_mel,
    published,
)
from resonate_lib.rewards.lalm_training import (
    Packer,
    answer_logits,
    answer_loss,
    answer_numbers,
    draw_negatives,
    fit_lalm,
    gather_texts,
    learn_answers,
)
from resonate_lib.rewards.rules import hallucination_penalty, keyword_f1, wer_reward

RATE, SAMPLES = 16000, 64000
TONES = {"low hum": 200.0, "mid tone": 900.0, "high beep": 3000.0}
CLAP_TOY = ClapConfig(width=32, heads=2, audio_layers=1, text_layers=1, embedding=16)
LALM_TOY = LalmShape(width=32, heads=2, audio_layers=1, text_layers=2)


def fake_text(prompts):
    """A token encoder without weights: each word its own fixed vector, zeros past the end."""
    rows = []
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(zlib.crc32(word.encode())) for word in prompt.split()]
        rows.append(torch.stack([torch.randn(384, generator=g) for g in generators]))
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Condition(states, states.sum(1))


class ToyCorpus:
    """Two of three tones, one after the other, in the batch format the training functions ask for."""

    def batch(self, generator, size):
        names, time = list(TONES), torch.arange(16000) / RATE
        audio, activity = torch.zeros(size, SAMPLES), torch.zeros(size, 100, 3)
        captions, negatives = [], []
        for row in range(size):
            first, second, other = torch.randperm(3, generator=generator).tolist()
            for which, start in ((first, 4000), (second, 36000)):
                tone = torch.sin(2 * torch.pi * TONES[names[which]] * time)
                audio[row, start : start + 16000] = 0.3 * tone
                activity[row, start // 640 : (start + 16000) // 640, which] = 1
            said = [f"a {names[k]}" for k in (first, second, other)]
            captions.append(f"{said[0]}, followed by {said[1]}")
            negatives.append(
                {"swapped": f"{said[1]}, followed by {said[0]}", "replaced": f"{said[0]}, followed by {said[2]}"}
            )
        return {"audio": audio, "captions": captions, "negatives": negatives, "activity": activity}


@pytest.fixture(scope="module")
def scene():
    return ToyCorpus().batch(torch.Generator().manual_seed(5), 6)


@pytest.fixture(scope="module")
def clap():
    torch.manual_seed(0)
    return ClapReward(SmallCLAP(CLAP_TOY, text=fake_text), card={"seed": 0})


@pytest.fixture(scope="module")
def lalm():
    processor = build_processor(gather_texts(ToyCorpus(), 0, size=8, batches=2), LALM_TOY)
    return LalmReward(build_model(processor, LALM_TOY, seed=0), processor, card={"seed": 0})


# The contract


def loud(audio, sample_rate, prompts, metadata):
    return audio.abs().mean(dim=1)


def test_check_result_gives_float32_on_the_cpu_and_keeps_parts():
    result = check_result(RewardResult([1, 2], {"order": torch.tensor([float("nan"), 1.0])}), 2, "mine")
    assert result.scores.dtype == torch.float32 and result.scores.tolist() == [1.0, 2.0]
    assert result.parts["order"].shape == (2,)


@pytest.mark.parametrize(
    "result, said",
    [
        (RewardResult(torch.zeros(3)), r"'mine'.*\(3,\).*\(2,\)"),
        (RewardResult(torch.zeros(2, 1)), r"'mine'.*\(2, 1\)"),
        (RewardResult(torch.tensor([0.0, float("nan")])), r"'mine'.*\[1\]=nan"),
        (RewardResult(torch.tensor([float("inf"), 0.0])), r"'mine'.*\[0\]=inf"),
        (RewardResult(["loud", "quiet"]), "'mine'.*numbers"),
        (RewardResult(torch.zeros(2), {"p": torch.zeros(1)}), "'mine'.*part 'p'"),
        (torch.zeros(2), "'mine'.*RewardResult"),
    ],
)
def test_check_result_refuses(result, said):
    with pytest.raises(ValueError, match=said):
        check_result(result, 2, "mine")


def test_checked_refuses_wrong_inputs():
    reward = Checked(lambda *a: RewardResult(torch.zeros(2)), "mine")
    with pytest.raises(ValueError, match="2 clips but 1 prompts"):
        reward(torch.zeros(2, 10), RATE, ["a"])
    with pytest.raises(ValueError, match="audio has shape"):
        reward(torch.zeros(10), RATE, ["a"])


def test_weighted_mix_is_the_sum_per_sample_and_keeps_parts():
    def one(*call):
        return RewardResult(torch.tensor([1.0, 2.0]), {"p": torch.tensor([0.1, 0.2])})

    def two(*call):
        return RewardResult(torch.tensor([10.0, -4.0]))

    result = WeightedMix([(2.0, "one", one), (0.5, "two", two)])(torch.zeros(2, 8), RATE, ["a", "b"])
    assert result.scores.tolist() == [7.0, 2.0]
    assert result.parts["one"].tolist() == [1.0, 2.0] and torch.equal(result.parts["one/p"], torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="once"):
        WeightedMix([(1.0, "one", one), (1.0, "one", two)])


# load_reward


def test_load_reward_reads_a_users_function_from_a_file(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("def length(audio, sample_rate, prompts, metadata):\n    return [len(p) for p in prompts]\n")
    reward = load_reward(f"{path}:length")
    assert reward(torch.zeros(2, 4), RATE, ["ab", "abcd"]).scores.tolist() == [2.0, 4.0]
    mix = load_reward(f"0.5*{path}:length+2*clap", clap=lambda *a: RewardResult(torch.ones(2)))
    assert mix(torch.zeros(2, 4), RATE, ["ab", "abcd"]).scores.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="nearest: 'length'"):
        load_reward(f"{path}:lenght")
    path.write_text("def broken(:\n")
    with pytest.raises(ValueError, match="does not load: SyntaxError"):
        load_reward(f"{path}:broken")


def test_load_reward_reads_a_module_and_checks_what_it_returns():
    reward = load_reward("builtins:print")
    with pytest.raises(ValueError, match="'builtins:print'"):
        reward(torch.zeros(2, 4), RATE, ["a", "b"])


@pytest.mark.parametrize(
    "spec, said",
    [
        ("calp", "nearest: 'clap'"),
        ("0.5*clap+lamb", "no reward 'lamb'"),
        ("half*clap", "'half' is not a number"),
        ("", "name a reward"),
        ("no_such_module:score", "cannot import 'no_such_module'"),
    ],
)
def test_load_reward_names_the_mistake_on_one_line(spec, said):
    with pytest.raises(ValueError, match=said) as error:
        load_reward(spec, clap=loud, lalm=loud)
    assert "\n" not in str(error.value)


def test_load_reward_says_where_a_file_or_checkpoint_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_reward(str(tmp_path / "absent.py") + ":score")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_reward("clap", weights=tmp_path)


# CLAP


def test_clap_scores_are_cosines_and_do_not_depend_on_the_batch(clap, scene):
    together = clap(scene["audio"], RATE, scene["captions"]).scores
    alone = [clap(a[None], RATE, [c]).scores for a, c in zip(scene["audio"], scene["captions"], strict=True)]
    assert together.abs().max() <= 1
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_clap_text_tower_hears_the_order_of_words(clap):
    a, b = clap.model.encode_text(["rain, followed by a bell", "a bell, followed by rain"])
    assert (a - b).abs().max() > 1e-3


def test_clap_resamples_and_refuses_longer_clips(clap, scene):
    halved = scene["audio"][:1, ::2]
    assert clap(halved, RATE // 2, scene["captions"][:1]).scores.shape == (1,)
    with pytest.raises(ValueError, match="hears 4 s"):
        clap(torch.zeros(1, 5 * RATE), RATE, ["a"])


def test_clap_saves_and_loads(clap, scene, tmp_path):
    clap.save(tmp_path / "clap")
    again = ClapReward.load(tmp_path / "clap", text=fake_text)
    assert again.card == {"seed": 0} and again.model.config == CLAP_TOY
    before, after = (r(scene["audio"], RATE, scene["captions"]).scores for r in (clap, again))
    torch.testing.assert_close(before, after, atol=0.02, rtol=0)  # 8 bits a weight
    mix = load_reward("0.5*clap", weights=tmp_path, text=fake_text)
    torch.testing.assert_close(mix(scene["audio"], RATE, scene["captions"]).scores, after / 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clap"]


def test_info_nce_by_hand():
    sounds = texts = torch.eye(2)
    hard = torch.stack([torch.eye(2)[:1], torch.eye(2)[:1]])
    e = torch.tensor(1.0).exp()
    first = -(e / (2 * e + 1)).log()  # its hard negative ties with its caption
    second = -(e / (e + 2)).log()
    back = -(e / (e + 1)).log()
    expected = 0.5 * ((first + second) / 2 + back)
    torch.testing.assert_close(info_nce(sounds, texts, hard, torch.tensor(1.0)), expected)
    absent = torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(info_nce(sounds, texts, hard, torch.tensor(1.0), absent=absent), back)
    same = torch.ones(2, 2, dtype=torch.bool)
    without = info_nce(sounds, texts, hard, torch.tensor(1.0), same=same, absent=absent)
    assert without.item() == 0.0


def test_recall_counts_strict_wins(clap, scene):
    audio, captions = scene["audio"], scene["captions"]
    wrong = [list(row.values()) for row in scene["negatives"]]
    sounds = clap.embed_audio(audio, 16000)
    won = recall_hits(clap, sounds, captions, wrong)
    own = clap(audio, 16000, captions).scores
    best = torch.stack([max(clap(audio[i : i + 1], 16000, [text]).scores for text in row) for i, row in enumerate(wrong)]).flatten()
    assert won.tolist() == (own > best).tolist()
    assert not recall_hits(clap, sounds, captions, [[c] for c in captions]).any()  # ties are misses


# LALM


def test_lalm_features_equal_the_real_extractor(lalm, scene):
    extractor = lalm.processor.feature_extractor
    real = extractor(list(scene["audio"].numpy()), sampling_rate=RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(log_mel(scene["audio"], extractor), real, atol=1e-5, rtol=0)


def test_lalm_inputs_equal_the_real_processor_through_its_chat_template(lalm, scene):
    prompts = ["a low hum", *scene["captions"][1:]]
    texts = []
    for prompt in prompts:
        content = [{"type": "audio"}, {"type": "text", "text": QUESTION.format(caption=prompt)}]
        turn = [{"role": "user", "content": content}]
        texts.append(lalm.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
    clips = list(scene["audio"].numpy())
    real = lalm.processor(text=texts, audio=clips, return_tensors="pt", padding=True, sampling_rate=RATE)
    ours = lalm.inputs(scene["audio"], published(prompts))
    assert set(real) == set(ours)
    for key in ("input_ids", "attention_mask", "feature_attention_mask"):
        assert torch.equal(real[key], ours[key]), key
    assert ours["attention_mask"][0, 0] == 0 and ours["attention_mask"][:, -1].all()  # padded on the left
    with torch.no_grad():
        logits = lalm.model(**real).logits[:, -1]
    torch.testing.assert_close(lalm.logits(scene["audio"], published(prompts)), logits, atol=1e-4, rtol=0)


def test_lalm_score_is_the_sigmoid_of_yes_minus_no(lalm, scene):
    result = lalm(scene["audio"], RATE, scene["captions"])
    logits = lalm.logits(scene["audio"], published(scene["captions"]))
    yes, no = answer_ids(lalm.processor)
    chance = logits.softmax(-1)
    share_yes, share_no = chance[:, yes].sum(-1), chance[:, no].sum(-1)
    torch.testing.assert_close(result.scores, share_yes / (share_yes + share_no))
    torch.testing.assert_close(result.parts["p_yes_mass"], share_yes + share_no)


def test_lalm_scores_do_not_depend_on_the_batch(lalm, scene):
    prompts = ["a low hum", *scene["captions"][1:]]
    together = lalm(scene["audio"], RATE, prompts).scores
    alone = [lalm(a[None], RATE, [p]).scores for a, p in zip(scene["audio"], prompts, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    silent = lalm(torch.zeros(1, SAMPLES), RATE, ["a low hum"])
    assert torch.isfinite(silent.scores).all()


def test_lalm_vocabulary_keeps_words_whole_and_refuses_control_tokens(lalm):
    tokens = lalm.processor.tokenizer
    assert [tokens.decode(i) for i in tokens.encode("a low hum, followed by a high beep")][1:3] == [" low", " hum"]
    assert tokens.decode(tokens.encode("Ein unbekanntes Geräusch")) == "Ein unbekanntes Geräusch"
    assert len(tokens.encode("Yes")) == len(tokens.encode("No")) == 1
    with pytest.raises(ValueError, match="control token"):
        lalm(torch.zeros(1, SAMPLES), RATE, ["a <|AUDIO|> b"])


def test_lalm_saves_and_loads(lalm, scene, tmp_path):
    lalm.save(tmp_path / "lalm")
    assert (tmp_path / "lalm" / "model.safetensors").is_file()
    again = load_reward("lalm", weights=tmp_path)
    before = lalm(scene["audio"], RATE, scene["captions"])
    assert torch.equal(again(scene["audio"], RATE, scene["captions"]).scores, before.scores)
    assert again.reward.card == {"seed": 0}


def test_packed_questions_equal_separate_forwards(lalm, scene):
    packer = Packer(lalm.processor)
    false = [[row["swapped"], "a low hum"] for row in scene["negatives"]]
    packed = packer(scene["captions"], false)
    with torch.no_grad():
        heard = lalm.model.model.audio_tower(
            log_mel(scene["audio"], lalm.processor.feature_extractor)
        ).last_hidden_state
        logits = answer_logits(lalm.model, packer, packed, heard)
    for kind, prompts in ((0, scene["captions"]), (1, [row[0] for row in false])):
        rows = [int(((packed.rows == i) & (packed.kinds == kind)).nonzero()[0]) for i in range(6)]
        torch.testing.assert_close(logits[rows], lalm.logits(scene["audio"], published(prompts)), atol=1e-4, rtol=0)
    decode = lalm.processor.tokenizer.decode
    answer = packed.answers[(packed.rows == 2) & (packed.kinds == 2)]
    assert decode(answer) == scene["captions"][2] + "<|im_end|>"
    counts = torch.bincount(packed.kinds, minlength=5)
    loss, sums = answer_loss(logits, packed, counts)
    numbers = answer_numbers(sums, counts)
    assert loss.item() == pytest.approx(numbers["question"] + numbers["caption"], rel=1e-5)
    assert loss.item() == pytest.approx(numbers["loss"], rel=1e-5)
    of = [packed.kinds == kind for kind in range(3)]
    means = [torch.nn.functional.cross_entropy(logits[rows], packed.answers[rows]).item() for rows in of]
    assert numbers["question"] == pytest.approx((means[0] + means[1]) / 2, rel=1e-4)
    assert numbers["caption"] == pytest.approx(means[2], rel=1e-4) and math.isnan(numbers["fine_yes_right"])


def test_packed_captions_equal_the_models_own_loss(lalm, scene):
    """The captioning loss of one clip against the labels path of the transformers class."""
    packer, caption = Packer(lalm.processor), scene["captions"][0]
    packed = packer([caption], [[]])
    heard = lalm.model.model.audio_tower(
        log_mel(scene["audio"][:1], lalm.processor.feature_extractor)
    ).last_hidden_state
    with torch.no_grad():
        counts = torch.bincount(packed.kinds, minlength=5)
        _, sums = answer_loss(answer_logits(lalm.model, packer, packed, heard), packed, counts)
        numbers = answer_numbers(sums, counts)
    frame = PromptFrame(lalm.processor)
    text = frame.prefix + frame.suffix(lalm_module.DESCRIBE) + caption + "<|im_end|>"
    inputs = lalm.processor.tokenizer(text, return_tensors="pt")
    answer = len(lalm.processor.tokenizer.encode(caption)) + 1
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    more = {k: v for k, v in lalm.inputs(scene["audio"][:1], [caption]).items() if "feature" in k}
    with torch.no_grad():
        loss = lalm.model(**inputs, **more, labels=labels).loss
    assert numbers["caption"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_batch_learned_in_parts_by_length_has_the_gradient_of_the_whole(lalm, scene, monkeypatch):
    packer, model = Packer(lalm.processor), copy.deepcopy(lalm.model)
    rows = [packer.row(caption, ["a low hum"] * (number % 3)) for number, caption in enumerate(scene["captions"])]
    heard = model.model.audio_tower(log_mel(scene["audio"], lalm.processor.feature_extractor)).last_hidden_state.detach()
    found = {}
    for most in (100, 2):
        monkeypatch.setattr(lalm_training, "ROWS_AT_ONCE", most)
        model.zero_grad()
        gradient, numbers = learn_answers(model, packer, rows, heard)
        found[most] = [gradient, model.lm_head.weight.grad.clone(), torch.tensor([numbers["loss"]])]
    for whole, parts in zip(found[100], found[2], strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_draw_negatives_takes_a_wrong_count_first_and_is_uniform_over_the_other_kinds():
    rows = [{"swapped": "s", "missing": "m", "replaced": "r", "count": "c"}] * 900
    drawn = draw_negatives(rows, 2, torch.Generator().manual_seed(0))
    assert all(len(x) == 2 and x[0] == "c" for x in drawn)
    assert all(250 < [x[1] for x in drawn].count(kind) < 350 for kind in "smr")
    assert draw_negatives([{}, {"count": "c"}], 2, torch.Generator()) == [[], ["c"]]


# Training


def small_fit(kind, checkpoint=None, steps=4):
    more = {"batch_size": 4, "seed": 3, "checkpoint": checkpoint, "precision": "float32", "steps": steps}
    if kind == "clap":
        return fit_clap(ToyCorpus(), config=CLAP_TOY, text=fake_text, **more)
    texts = gather_texts(ToyCorpus(), 0, size=8, batches=2)
    return fit_lalm(ToyCorpus(), warmup_steps=1, shape=LALM_TOY, texts=texts, **more)


@pytest.mark.parametrize("kind", ["clap", "lalm"])
def test_training_resumes_to_the_same_weights(kind, tmp_path, monkeypatch, scene):
    whole, history = small_fit(kind)
    from resonate_lib import training

    original = training.fit

    class Stop(Exception):
        pass

    def stop_after_two(step, **arguments):
        def guarded(i, generator):
            if i == 2:
                raise Stop
            return step(i, generator)

        return original(guarded, **(arguments | {"save_every": 1}))

    monkeypatch.setattr(training, "fit", stop_after_two)
    with pytest.raises(Stop):
        small_fit(kind, tmp_path / "state.pt")
    monkeypatch.setattr(training, "fit", original)
    resumed, resumed_history = small_fit(kind, tmp_path / "state.pt")
    assert [row["loss"] for row in resumed_history if "loss" in row] == [
        row["loss"] for row in history if "loss" in row
    ]
    for one, two in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    a, b = (r(scene["audio"], RATE, scene["captions"]).scores for r in (whole, resumed))
    assert torch.equal(a, b)


def test_lalm_refuses_a_warm_up_longer_than_training():
    with pytest.raises(ValueError, match="warmup_steps=4 of steps=4"):
        fit_lalm(ToyCorpus(), steps=4, batch_size=2, seed=0, warmup_steps=4, texts=["a"])


# Rules


def test_wer_reward():
    assert wer_reward("The cat, sat!", "the cat sat") == 1.0
    assert wer_reward("the cat", "the cat sat on") == pytest.approx(0.5)
    assert wer_reward("a b c d e f g", "x") == 0.0
    assert wer_reward("", "") == 1.0 and wer_reward("hm", "...") == 0.0 and wer_reward("", "yes") == 0.0


def test_keyword_f1():
    assert keyword_f1("call Anna now", "call anna", ["Anna", "call"]) == 1.0
    assert keyword_f1("call bob", "call anna", ["anna", "bob", "call"]) == pytest.approx(0.5)
    assert keyword_f1("call bob", "call anna", ["anna", "bob", "call"], {"call": 2.0}) == pytest.approx(2 / 3)
    assert keyword_f1("new york", "in New York.", ["New York"]) == 1.0
    assert keyword_f1("nothing", "at all", ["anna"]) == 1.0 and keyword_f1("", "anna", ["anna"]) == 0.0


def test_hallucination_penalty():
    assert hallucination_penalty("the cat", "The cat sat.") == 0.0 == hallucination_penalty("", "anything")
    assert hallucination_penalty("yes yes yes yes", "yes") == pytest.approx(0.75)
    assert hallucination_penalty("thanks for watching", "") == 1.0
