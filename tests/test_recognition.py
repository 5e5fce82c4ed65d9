"""The recogniser: against the class's own forward and the real processor, learning on tones, reinforcement, engines, bad input."""

import base64
import io
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import miniature_lalm
import numpy as np
import pytest
import soundfile
import tones
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_remote import serving
from transformers import Qwen2AudioForConditionalGeneration

from resonate_lib.config_speech import RecognitionConfig
from resonate_lib.rewards.lalm import build_model, build_processor, conversation
from resonate_lib.rewards.rules import hallucination_penalty, wer_reward
from resonate_lib.speech import recognition_rl as rl
from resonate_lib.speech import recognition_training as training
from resonate_lib.speech import token_policy
from resonate_lib.speech.engine import Engine
from resonate_lib.speech.recognition import INSTRUCTION, SHAPE, Recogniser, clips_of, fitting
from resonate_lib.turns import Timeline, resident_bytes

SMALL = {"utterances_per_step": 16, "group_size": 6, "max_new_tokens": 8, "warmup_steps": 0, "micro_batch": 8}


def untrained(seed=0):
    processor = build_processor([*tones.WORDS, INSTRUCTION], tones.SHAPE)
    return Recogniser(build_model(processor, tones.SHAPE, seed=seed), processor)


def reward(hypothesis, utterance):
    right, extra = wer_reward(hypothesis, utterance.text), hallucination_penalty(hypothesis, utterance.text)
    return right - 0.5 * extra, {"wer": right, "hallucination": extra}


def held_out_errors(recogniser, corpus):
    said = recogniser.transcribe(clips_of(corpus, range(len(corpus.audio))), max_new_tokens=8)
    return sum(rl.word_errors(text, one)["errors"] for text, one in zip(said, corpus.texts, strict=True))


@pytest.fixture(scope="module")
def taught():
    """A recogniser that knows half of it, and its history."""
    corpus = tones.Tones(tones.sentences(400))
    return training.fit_recogniser(
        corpus, vocabulary=tones.WORDS, steps=300, batch_size=16, seed=0, shape=tones.SHAPE, learning_rate=4e-3
    )


@pytest.fixture(scope="module")
def held_out():
    return tones.Tones(tones.sentences(60, seed=9), seed=5)


@pytest.fixture(scope="module")
def pool():
    return tones.Tones(tones.sentences(120, seed=3), seed=8)


# --- the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [(1.0, 0.35, 0.8), (2.0, 0.5, 1.99)])
def test_prompts_equal_the_class_with_the_real_processor(seconds):
    recogniser = untrained()
    random = torch.Generator().manual_seed(1)
    clips = [0.1 * torch.randn(round(16000 * s), generator=random) for s in seconds]
    processor = recogniser.processor
    text = processor.apply_chat_template(conversation(INSTRUCTION), add_generation_prompt=True, tokenize=False)
    audio = [clip.numpy() for clip in clips]
    real = processor(text=[text] * 3, audio=audio, sampling_rate=16000, return_tensors="pt", padding=True)
    positions = (real["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = recogniser.model(**real, position_ids=positions).logits[:, -1]
        mine = recogniser.inputs(clips)
        _, got, _ = token_policy.prefill(recogniser.model, mine, 1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    if max(seconds) < 1.5:
        assert mine["inputs_embeds"].shape[1] == real["input_ids"].shape[1]
        assert recogniser.features(clips)[0].shape[-1] < real["input_features"].shape[-1]  # shorter than the class asks


def test_the_default_size():
    processor = build_processor([*tones.WORDS, INSTRUCTION], SHAPE)
    model = build_model(processor, SHAPE, seed=0)
    words = sum(parameter.numel() for parameter in model.parameters()) - 2 * len(processor.tokenizer) * SHAPE.width
    assert words + 2 * 1400 * SHAPE.width < 1.2e6  # with the vocabulary of the spoken corpus
    recogniser = Recogniser(model, processor)
    assert recogniser.seconds == 10 and recogniser.transcribe([torch.zeros(160_000)], max_new_tokens=2)


def test_every_word_is_one_token_and_any_text_encodes():
    recogniser = untrained()
    texts = ["banjo seven window", "", "Zürich, naïve — 東京", "<|im_end|> red <|AUDIO|>", "it's"]
    ids, mask = recogniser.encode(texts)
    assert mask.sum(-1)[:2].tolist() == [4, 1]
    assert all(row[kept][-1] == recogniser.end[0] for row, kept in zip(ids, mask, strict=True))
    assert recogniser.processor.audio_token_id not in ids[mask].tolist()
    assert recogniser.decode(ids, mask) == texts


def test_odd_audio_is_transcribed_and_too_long_audio_is_refused_first():
    recogniser = untrained()
    clips = [torch.zeros(0), torch.zeros(3), torch.zeros(16000), torch.full((5000,), 0.9), 3 * torch.randn(20000)]
    said = recogniser.transcribe(clips, max_new_tokens=3)
    assert len(said) == 5 and all(isinstance(text, str) for text in said)
    assert recogniser.transcribe([], max_new_tokens=3) == []
    assert recogniser.transcribe(torch.zeros(2, 8000), 8000, max_new_tokens=3) == [said[2]] * 2
    with pytest.raises(ValueError, match=r"audio of 2\.50 s: this recogniser hears 2 s; cut it"):
        recogniser.transcribe([*clips, torch.zeros(40000)])


def test_too_long_utterances_are_left_out_and_counted():
    corpus = tones.Tones(["red", "green blue", " ".join(tones.WORDS * 2)])
    assert fitting(corpus, 2.0) == ([0, 1], 1)
    with pytest.raises(ValueError, match=r"all 3 clips are longer than 0\.01 s"):
        fitting(corpus, 0.01)


def test_saved_and_loaded(tmp_path, taught, held_out):
    recogniser, _ = taught
    clips = clips_of(held_out, range(12))
    said = recogniser.transcribe(clips, max_new_tokens=8)
    recogniser.save(tmp_path / "full")
    again = Recogniser.load(tmp_path / "full")
    assert again.transcribe(clips, max_new_tokens=8) == said and again.card == recogniser.card
    recogniser.save(tmp_path / "small", bits=8)
    small = Recogniser.load(tmp_path / "small")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "small")]
    assert sizes[1] < 0.3 * sizes[0]
    assert sum(a == b for a, b in zip(small.transcribe(clips, max_new_tokens=8), said, strict=True)) >= 10
    recogniser.save(tmp_path / "half", bits=16)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "half", local_files_only=True, dtype=torch.float32)
    weight = model.lm_head.weight
    torch.testing.assert_close(weight, recogniser.model.lm_head.weight, atol=2e-3, rtol=0)


def test_a_published_model_loads_by_name_and_another_family_does_not(tmp_path):
    folder = miniature_lalm.write(tmp_path / "qwen2", "qwen2_audio")
    recogniser = Recogniser.load(folder, device="cpu")
    clips = [0.1 * torch.randn(9000), 0.1 * torch.randn(30000)]
    assert len(recogniser.transcribe(clips, max_new_tokens=4)) == 2 and recogniser.seconds == 2
    assert all(p.requires_grad for name, p in recogniser.model.named_parameters() if "embed_positions" not in name)
    other = miniature_lalm.write(tmp_path / "omni", "qwen2_5_omni")
    with pytest.raises(ValueError, match="recognition takes models of the class of Qwen2-Audio"):
        Recogniser.load(other, device="cpu")
    (folder / "model_card.json").write_text(json.dumps({"class": "Judge"}))
    with pytest.raises(ValueError, match="holds a Judge, not a recogniser"):
        Recogniser.load(folder)


# --- supervised ----------------------------------------------------------------------------------------------------------


def test_supervised_training_teaches_to_listen(taught, held_out):
    recogniser, history = taught
    first, last = ([row[name] for row in rows] for name, rows in (("loss", history[:10]), ("loss", history[-10:])))
    assert np.mean(last) < 0.4 * np.mean(first)
    wrong, asked = held_out_errors(recogniser, held_out), sum(len(text.split()) for text in held_out.texts)
    assert wrong < 0.65 * asked < held_out_errors(untrained(), held_out)
    assert recogniser.card["steps"] == 300 and recogniser.card["left_out"] == 0


def test_batches_hold_clips_of_like_length_and_every_clip_equally_often():
    lengths = np.random.default_rng(0).integers(10, 100, 64).tolist()
    random, counts = torch.Generator().manual_seed(0), np.zeros(64)
    for _ in range(4000):
        batch = training.draw_batch(lengths, 8, random)
        counts[batch] += 1
        inside = sorted(lengths[place] for place in batch)
        assert inside == [lengths[place] for place in batch]
    assert abs(counts / 4000 - 1 / training.POOL).max() < 5 * math.sqrt(1 / 8 * 7 / 8 / 4000)
    spans = [np.ptp([lengths[place] for place in training.draw_batch(lengths, 8, random)]) for _ in range(50)]
    assert np.mean(spans) < 25  # of 90


def test_short_clips_come_first_and_all_of_them_in_time():
    counts = [training.admitted(step, 100, 1000) for step in range(100)]
    assert counts[0] == 150 and counts == sorted(counts) and counts[29] < 1000 == counts[30] == counts[-1]
    assert training.admitted(0, 1, 2) == 1


def test_ctc_is_minus_the_log_of_all_alignments():
    logits = torch.randn(1, 4, 1 + len(training.LETTERS), generator=torch.Generator().manual_seed(0))
    chance, target = logits[0].softmax(-1), training.letters_of("Ab!")
    assert target == [2, 3]
    total = 0.0
    for path in itertools.product([0, *target], repeat=4):
        collapsed = [label for label, _ in itertools.groupby(path) if label]
        if collapsed == target:
            total += math.prod(chance[place, label].item() for place, label in enumerate(path))
    got = training.ctc_loss(logits, torch.tensor([4]), ["Ab!"])
    assert got.item() == pytest.approx(-math.log(total) / 2, abs=1e-5)
    assert training.ctc_loss(logits, torch.tensor([4]), [""]).item() >= 0  # nothing said: blanks alone
    assert training.ctc_loss(logits, torch.tensor([4]), ["far too long for four places"]).item() == 0


def test_hidden_stretches_are_drawn_from_the_generator():
    features = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    frames = torch.tensor([64, 40, 10])
    a, b = (training.hide(features, frames, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(a, b) and 0.02 < (a != features).float().mean() < 0.7
    assert not torch.equal(a, training.hide(features, frames, torch.Generator().manual_seed(2)))


def test_ctc_takes_its_letters_to_where_the_logits_are(monkeypatch):
    seen = {}
    monkeypatch.setattr(training.F, "ctc_loss", lambda log_p, flat, *_, **__: seen.update(p=log_p, flat=flat) or log_p.sum())
    training.ctc_loss(torch.empty(2, 9, 1 + len(training.LETTERS), device="meta"), torch.tensor([9, 7]), ["ab", "c"])
    assert seen["flat"].shape == (3,) and seen["flat"].device == seen["p"].device == torch.device("meta")


def test_a_start_is_trained_where_the_gpu_is_and_in_the_asked_precision(monkeypatch, tmp_path, taught):
    from resonate_lib.config_speech import SpeechConfig
    from resonate_lib.data import speech

    asked, loaded, opened = {}, [], tones.Tones(tones.sentences(12))
    opened.select = lambda places: asked.setdefault("kept", list(places)) and opened

    def fit(corpus, **options):
        asked.update(options)
        return taught

    monkeypatch.setattr(training, "fit_recogniser", fit)
    monkeypatch.setattr(speech, "open_speech", lambda *a, **k: opened)
    monkeypatch.setattr(type(opened), "__len__", lambda self: 12, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Recogniser, "load", lambda folder, **options: loaded.append(options))
    places = iter([None, tmp_path / "r", tmp_path / "r"])
    run = SimpleNamespace(resolve_input=lambda *a, **k: next(places), state=lambda name: None, checkpoint=tmp_path.joinpath)
    config = RecognitionConfig(probe_utterances=8, chosen=8, utterances_per_step=2, precision="bf16", supervised_silences=0)
    for _ in range(2):  # trained here, and found
        training.open_start(run, config, SpeechConfig(speech_folder="x"), seed=0, cache=tmp_path)
    assert (asked["device"], asked["precision"], asked["kept"]) == ("cuda", "bf16", [0, 1, 2, 3])
    assert loaded == [{"device": "cuda"}] * 2


# --- reinforcement --------------------------------------------------------------------------------------------------------


def test_mwer_loss_by_hand_counts_equal_hypotheses_once():
    log_probs = torch.tensor([-1.0, -2.0, -1.0, -0.5, -3.0, -0.1], requires_grad=True)
    errors, groups = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 4.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    distinct = torch.tensor([True, True, False, True, True, True])
    p = [math.exp(-1), math.exp(-2)]
    first = (p[0] * (0 - 1) + p[1] * (2 - 1)) / sum(p)
    q, wrong = [math.exp(-0.5), math.exp(-3), math.exp(-0.1)], [1, 0, 4]
    second = sum(chance * (w - 5 / 3) for chance, w in zip(q, wrong, strict=True)) / sum(q)
    loss = rl.mwer_loss(log_probs, errors, groups, distinct)
    assert loss.item() == pytest.approx(0.5 * (first + second), abs=1e-6)
    loss.backward()
    assert log_probs.grad[2] == 0 and log_probs.grad[0] < 0 < log_probs.grad[1]
    ids, mask = torch.tensor([[1, 2], [1, 3], [1, 2], [1, 2]]), torch.ones(4, 2, dtype=torch.bool)
    mask[1, 1] = False
    assert rl.first_of_equal(ids, mask, torch.tensor([0, 0, 0, 1])).tolist() == [True, True, False, True]


def test_a_round_scores_its_hypotheses_and_begins_at_ratio_one(taught, pool):
    recogniser = taught[0].fork()
    config = RecognitionConfig(**SMALL)
    made = rl.collect(recogniser, pool, reward, list(range(16)), config, torch.Generator().manual_seed(0),
                      turns=rl.taking_turns(recogniser))  # fmt: skip
    assert len(made.hypotheses) == len(made.rewards) == 96 and made.groups == 16 and len(made.batches) == 2
    for text, one, score, wrong in zip(made.hypotheses, made.utterances, made.rewards, made.errors, strict=True):
        assert score == pytest.approx(reward(text, one)[0], abs=1e-6) and wrong == rl.word_errors(text, one.text)["errors"]
    assert [len(one.text) for one in made.utterances[::48]] == sorted(len(one.text) for one in made.utterances[::48])
    with rl.learning(recogniser, config, seed=0) as (module, reference, held):
        optimizer = rl.make_optimizer(module, 1e-4)
        turns = rl.taking_turns(recogniser, optimizer=optimizer, **held)
        numbers = rl.update(recogniser, module, optimizer, made, config, reference, turns)
    assert 0 < numbers["first_ratio_deviation"] < 1e-4 and numbers["kl"] >= 0 and numbers["trained"] % 6 == 0


@pytest.mark.parametrize("objective", ["grpo", "mwer"])
def test_a_cooler_policy_begins_at_ratio_one_too(taught, pool, objective):
    recogniser = taught[0].fork()
    config = RecognitionConfig(**SMALL, steps=1, temperature=0.5, objective=objective)
    (row,) = rl.train(recogniser, pool, reward, config, seed=1)
    assert 0 < row["first_ratio_deviation"] < 1e-4 and row["skipped"] == 0


def test_parts_take_turns_in_a_round_and_the_sum_never_lies_on_the_device(taught, pool):
    recogniser, moves = taught[0].fork(), Timeline()
    rl.train(recogniser, pool, reward, RecognitionConfig(**SMALL, steps=2), timeline=moves)
    model, core = recogniser.model, recogniser.model.model
    encoder, decoder = map(resident_bytes, ([core.audio_tower, core.multi_modal_projector], [core.language_model, model.lm_head]))
    loads = [row for row in moves if row["action"] == "load"]
    a_round = ["encoder", "decoder", "reference", "encoder", "decoder", "optimizer"]
    assert [row["part"] for row in loads] == a_round + a_round[1:]  # the encoder stays from the update on
    assert [row["resident"] for row in loads[:3]] == [encoder, decoder, encoder + decoder]
    everything = 5 * (encoder + decoder)  # weights, gradients, two moments, the reference's weights
    assert loads[5]["everything"] == pytest.approx(everything, rel=0.01)
    assert max(row["resident"] for row in moves) < 0.82 * everything


def test_groups_that_tie_are_left_out_and_a_round_of_ties_teaches_nothing(taught, pool):
    recogniser = taught[0].fork()
    before = [p.clone() for p in recogniser.model.parameters()]
    flat = RecognitionConfig(**SMALL, steps=2)
    history = rl.train(recogniser, pool, lambda hypothesis, utterance: (1.0, {"same": 1.0}), flat)
    assert [row["skipped"] for row in history] == [1.0, 1.0] and history[0]["zero_groups"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, recogniser.model.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["grpo", "mwer"])
def test_reinforcement_lowers_word_errors_on_unseen_utterances(taught, pool, held_out, objective):
    recogniser = taught[0].fork()
    more = {"utterances_per_step": 24, "group_size": 8, "beta": 0.0, "learning_rate": 1e-3}
    config = RecognitionConfig(**SMALL | more, steps=12, objective=objective)

    def sampled_errors():
        made = rl.collect(recogniser, held_out, reward, range(60), config, torch.Generator().manual_seed(0),
                          turns=rl.taking_turns(recogniser))  # fmt: skip
        return made.errors.mean().item()

    before = sampled_errors()
    history = rl.train(recogniser, pool, reward, config, seed=1)
    assert sampled_errors() < 0.9 * before
    assert max(row["first_ratio_deviation"] for row in history) < 1e-4


def test_same_seed_same_numbers_and_resume_equals_uninterrupted(tmp_path, taught, pool):
    config = RecognitionConfig(**SMALL | {"utterances_per_step": 6}, steps=4)
    runs, moves = [], [Timeline() for _ in range(4)]
    for timeline in moves[:2]:
        recogniser = taught[0].fork()
        runs.append((rl.train(recogniser, pool, reward, config, seed=3, timeline=timeline), recogniser.model.state_dict()))
    assert runs[0][0] == runs[1][0]
    state, first = tmp_path / "state.pt", taught[0].fork()

    def stop(i, made, metrics):
        if i == 2:
            raise KeyboardInterrupt

    from resonate_lib.speech import recognition_rl

    every = recognition_rl.SAVE_EVERY
    recognition_rl.SAVE_EVERY = 1
    try:
        with pytest.raises(KeyboardInterrupt):
            rl.train(first, pool, reward, config, seed=3, checkpoint=state, callback=stop, timeline=moves[2])
        resumed = taught[0].fork()
        history = rl.train(resumed, pool, reward, config, seed=3, checkpoint=state, timeline=moves[3])
        again = Timeline()
        rl.train(taught[0].fork(), pool, reward, config, seed=3, checkpoint=state, timeline=again)
    finally:
        recognition_rl.SAVE_EVERY = every
    assert history == runs[0][0]
    assert moves[3][:19] == moves[0][:19] and again == moves[3]  # of the two rounds before; nothing is added at the end
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, runs[0][1][name]), name


def test_lora_learns_in_bfloat16_and_leaves_an_ordinary_model(taught, pool):
    recogniser = taught[0].fork()
    before = {name: tensor.clone() for name, tensor in recogniser.model.state_dict().items()}
    config = RecognitionConfig(**SMALL, steps=2, trained="lora", lora_rank=4, learning_rate=1e-3, precision="bf16")
    history = rl.train(recogniser, pool, reward, config)
    after = recogniser.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(after) == set(before) and changed
    assert all(name.removesuffix(".weight").endswith(rl.LORA_TARGETS) for name in changed)
    assert max(row["first_ratio_deviation"] for row in history) == 0.0  # scored anew by the same computation
    assert history[-1]["kl"] > 0


def test_a_published_model_learns_by_adapters_in_bfloat16(tmp_path, pool):
    recogniser = Recogniser.load(miniature_lalm.write(tmp_path / "qwen2", "qwen2_audio"), dtype="bf16", device="cpu")
    config = RecognitionConfig(**SMALL | {"utterances_per_step": 4}, steps=1, trained="lora", precision="bf16", beta=0.1)
    scored = lambda text, utterance: (float(len(text)), {})  # noqa: E731
    history = rl.train(recogniser, pool, scored, config)
    assert history[0]["trained"] > 0 and history[0]["first_ratio_deviation"] == 0.0 and math.isfinite(history[0]["loss"])
    assert recogniser.model.lm_head.weight.dtype == torch.bfloat16
    recogniser.save(tmp_path / "tuned")
    assert Recogniser.load(tmp_path / "tuned").transcribe([torch.zeros(8000)], max_new_tokens=2)


def test_bad_utterances_do_not_stop_a_job(taught):
    corpus = tones.Tones(["", "red blue", "green", "banjo", "seven window", " ".join(tones.WORDS * 2)])
    corpus.utterances[1] = tones.Said("odd", "Zürich 東京 <|im_end|>")
    corpus.audio[2] = corpus.audio[2][:0]
    config = RecognitionConfig(**SMALL | {"utterances_per_step": 5, "group_size": 3}, steps=2, objective="mwer")
    history = rl.train(taught[0].fork(), corpus, reward, config)
    assert all(math.isfinite(row["loss"]) for row in history if not row["skipped"])
    with pytest.raises(ValueError, match="only 2 utterances to draw from"):
        rl.train(taught[0].fork(), corpus, reward, config, positions=[0, 1, 5])


# --- an engine ------------------------------------------------------------------------------------------------------------


def engine_of(recogniser, *, broken=""):
    """Answers as a server would that runs the recogniser; `broken`: what its first choice lacks."""

    def answer(request, headers):
        parts = {part["type"]: part for part in request["messages"][-1]["content"]}
        assert parts["text"]["text"] == INSTRUCTION
        clip, _ = soundfile.read(io.BytesIO(base64.b64decode(parts["input_audio"]["input_audio"]["data"])), dtype="float32")
        settings = {"group_size": request["n"], "max_new_tokens": request["max_tokens"], "temperature": request["temperature"]}
        generator = torch.Generator().manual_seed(request["seed"])
        with torch.no_grad():
            inputs = recogniser.inputs([torch.from_numpy(clip)])
            got = token_policy.sample(recogniser.model, inputs, generator=generator, **settings)
            log_probs = token_policy.token_log_probs(recogniser.model, inputs, got.ids, got.mask)  # as servers do: at 1
        choices = []
        for text, kept, values in zip(recogniser.decode(got.ids, got.mask), got.mask, log_probs, strict=True):
            tokens = [{"token": "?", "logprob": value} for value in values[kept].tolist()]
            choices.append({"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": tokens}})
        if broken == "text":
            choices[0]["message"]["content"] = None
        return 200, {"choices": choices[: request["n"] - (broken == "choices")]}

    return answer


def test_an_engine_samples_and_the_policy_scores(taught, pool):
    recogniser = taught[0].fork()
    with serving(engine_of(taught[0])) as (url, seen):
        config = RecognitionConfig(**SMALL | {"utterances_per_step": 4, "group_size": 3}, steps=2, rollout_source=f"{url}#small")
        random, cold = torch.Generator().manual_seed(0), replace(config, temperature=0.1)
        made = rl.collect(recogniser, pool, reward, range(4), cold, random, turns=rl.taking_turns(recogniser),
                          engine=Engine(f"{url}#small"))  # fmt: skip
        history = rl.train(recogniser, pool, reward, config)
    assert made.numbers["engine_gap"] < 1e-3  # texts that encode as they were sampled, by the same weights
    assert history[0]["first_ratio_deviation"] < 1e-4 and "engine_gap" in history[0]
    assert len(seen) == 12 and seen[0][0] == "/v1/chat/completions" and seen[0][1]["n"] == 3 and seen[0][1]["logprobs"]
    for batch in made.batches:
        assert torch.isfinite(batch.old).all() and (batch.old * ~batch.mask == 0).all()


def test_an_engine_that_says_nothing_or_too_little(taught, pool):
    config = RecognitionConfig(**SMALL | {"group_size": 3})
    ask = lambda url: rl.collect(  # noqa: E731
        taught[0], pool, reward, range(2), config, torch.Generator().manual_seed(0), engine=Engine(f"{url}#small", backoff=0.01),
        turns=rl.taking_turns(taught[0]),
    )
    with serving(engine_of(taught[0], broken="text")) as (url, _):
        assert ask(url).hypotheses[0] == ""
    nothing = lambda status: lambda request, headers: (status, {"error": "no"})  # noqa: E731
    answers = {
        "sends 2 of n=3 choices": engine_of(taught[0], broken="choices"),
        "no chat completion": nothing(200),
        "engine at .* refuses the request": nothing(400),
    }
    for reason, answer in answers.items():
        with serving(answer) as (url, _), pytest.raises(ValueError, match=reason):
            ask(url)


def test_a_hypothesis_that_was_cut_off_has_no_end_token(taught):
    replies = [[SimpleNamespace(text="red", ended=False, log_prob=-1.0), SimpleNamespace(text="red", ended=True, log_prob=-1.0)]]
    config = RecognitionConfig(**SMALL | {"group_size": 2})
    recogniser, stub = taught[0], SimpleNamespace(sample=lambda clips, **settings: replies)
    clips = [torch.zeros(8000)]
    with torch.no_grad():
        ids, mask, old, _ = rl._sampled(recogniser, recogniser.inputs(clips), clips, config, None, stub)
    assert mask.sum(-1).tolist() == [1, 2] and recogniser.decode(ids, mask) == ["red", "red"] and old[0, 1] == 0 > old[1, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_mwer_never_prefers_more_errors(errors, extra):
    """Moving probability to the hypothesis with the fewest errors never raises the loss."""
    wrong = torch.tensor([float(min(errors)), *map(float, errors), float(max(errors) + extra)])
    log_probs = torch.zeros(len(wrong), requires_grad=True)
    loss = rl.mwer_loss(log_probs, wrong, torch.zeros(len(wrong), dtype=torch.long), torch.ones(len(wrong), dtype=torch.bool))
    loss.backward()
    assert log_probs.grad[0] <= 1e-7 and log_probs.grad[-1] >= -1e-7 and abs(log_probs.grad.sum()) < 1e-6
