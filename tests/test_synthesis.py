"""The speaker: its tokenizer, what reads its tokens, GRPO and DiffRO on a toy, and input that breaks nothing."""

import itertools
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resonate_lib.config_speech import SpeakerConfig, SynthesisConfig
from resonate_lib.evaluation import stats
from resonate_lib.rewards.base import RewardResult
from resonate_lib.rewards.rules import wer_reward
from resonate_lib.speech import build, synthesis_eval, token_policy
from resonate_lib.speech import lines as spoken_lines
from resonate_lib.speech import synthesis_rl as rl
from resonate_lib.speech.lines import Line
from resonate_lib.speech.synthesis import (
    END,
    FIRST_TOKEN,
    LETTERS,
    SPEECH,
    Speaker,
    SpeakerShape,
    blurred,
    fit_speaker,
    letters,
    like_lengths,
)
from resonate_lib.speech.token_reward import WORST, ReaderShape, TokenReader, corrupt, fit_reader, mixed
from resonate_lib.speech.tokenizer import TokenizerShape, fit_tokenizer
from resonate_lib.turns import Timeline

SMALL = TokenizerShape(seconds=2.0, n_fft=1024, hop=320, frames_per_token=2, bands=32, latent_dim=12, width=16, codes=24,
                       code_dim=8)  # fmt: skip
CONFIG = SynthesisConfig(steps=2, lines_per_step=2, group_size=3, max_tokens=12, epochs=2, decode_iterations=1, learning_rate=1e-3)
LINES = [Line("open the door", "low", "fast"), Line("zzz", "high", "slow"), Line("call anna")]


def tones(count, seed=0, seconds=0.6):
    """Clips of two tones in turn, each with its own pitch."""
    random = torch.Generator().manual_seed(seed)
    t = torch.arange(round(16000 * seconds)) / 16000
    return [0.3 * torch.sin(2 * torch.pi * (120 + 900 * torch.rand((), generator=random)) * t) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return fit_tokenizer(tones(24), steps=60, batch_size=8, seed=0, shape=SMALL)[0]


@pytest.fixture
def speaker(tokenizer):
    return Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)


@pytest.fixture
def reader():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return TokenReader(ReaderShape(codes=24, width=12, layers=2)).eval().requires_grad_(False)


def silent(audio, sample_rate, prompts, metadata=None):
    """A recogniser that hears nothing, whatever is said."""
    return RewardResult(torch.tensor([wer_reward("", text) for text in prompts]))


def long_is_good(audio, sample_rate, prompts, metadata=None):
    return RewardResult(torch.tensor([len(clip) / sample_rate for clip in audio]))


# --- tokenizer ---


def test_a_round_trip_keeps_the_pitch_of_a_tone(tokenizer):
    clips = tones(6, seed=9)
    ids = tokenizer.encode(clips)
    assert all(row.dtype == torch.int64 and len(row) == 15 and row.min() >= 0 and row.max() < 24 for row in ids)  # 0.6 s at 25
    errors = []
    for clip, made in zip(clips, tokenizer.decode(ids), strict=True):
        assert made.shape == clip.shape
        hz = [float(torch.fft.rfft(x * torch.hann_window(len(x))).abs().argmax()) / 0.6 for x in (clip, made)]
        errors.append(abs(hz[0] - hz[1]))
    assert sorted(errors)[3] < 120  # Hz, of 900: the bands of this small codec are 30 to 130 Hz wide


def test_the_same_clip_gives_the_same_tokens_in_any_batch(tokenizer):
    clips = [tones(1, 1, 0.3)[0], tones(1, 2, 1.9)[0], tones(1, 3, 0.63)[0]]
    together, alone = tokenizer.encode(clips), [tokenizer.encode([clip])[0] for clip in clips]
    assert [len(row) for row in together] == [8, 48, 16]  # ceil(samples / 640)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    sounds, single = tokenizer.decode(together), [tokenizer.decode([row])[0] for row in together]
    assert all(torch.allclose(a, b, atol=0.1) for a, b in zip(sounds, single, strict=True))


def test_nearest_code_is_the_one_at_the_least_distance(tokenizer):
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokenizer.nearest(vectors), torch.cdist(vectors, tokenizer.codebook).argmin(1))


def test_a_decode_of_nothing_is_an_empty_clip_and_a_long_one_is_cut(tokenizer):
    none, long = torch.zeros(0, dtype=torch.long), torch.zeros(900, dtype=torch.long)
    empty, clip, long = tokenizer.decode([none, torch.tensor([3, 4]), long])
    assert empty.shape == (0,) and clip.shape == (1280,) and len(long) == 32000
    with pytest.raises(ValueError, match="this tokenizer takes 2 s"):
        tokenizer.encode([torch.zeros(40000)])


# --- lines and measures ---


def test_measures_of_a_known_sound():
    t = torch.arange(16000) / 16000
    voice = sum(torch.sin(2 * torch.pi * 125 * k * t) / k for k in range(1, 8))
    clip = torch.cat([torch.zeros(4000), 0.2 * voice, torch.zeros(4000)])
    assert abs(spoken_lines.pitch_hz(clip, 16000) - 125) < 2
    seconds = spoken_lines.letter_seconds(clip, 16000, "abcde, FGHij")  # 10 letters and a blank
    assert abs(seconds - 1 / (11 + spoken_lines.EDGE)) < 0.003
    for nothing in (torch.zeros(0), torch.zeros(16000)):
        assert all(value != value for value in spoken_lines.measures(nothing, 16000, "open").values())


def test_classes_by_their_limits():
    limits = {"pitch": [90.0, 125.0], "rate": [0.07, 0.05]}
    assert [spoken_lines.class_of("pitch", hz, limits) for hz in (60, 100, 200, float("nan"))] == ["low", "mid", "high", ""]
    assert [spoken_lines.class_of("rate", s, limits) for s in (0.09, 0.06, 0.02)] == ["slow", "normal", "fast"]
    with pytest.raises(ValueError, match="low, mid, high"):
        Line("open the door", pitch="deep")


def test_drawn_lines_of_two_splits_share_no_text_and_are_spoken_as_asked():
    pytest.importorskip("espeakng_loader")
    train, test = (spoken_lines.draw_lines(40, split=split, seed=0) for split in ("train", "test"))
    assert not {line.text for line in train} & {line.text for line in test}
    assert train == spoken_lines.draw_lines(40, split="train", seed=0)
    ways = [Line("open the window", pitch, "normal") for pitch in spoken_lines.PITCH]
    ways += [Line("open the window", "mid", rate) for rate in spoken_lines.RATE]
    clips = spoken_lines.natural(ways)
    hz = [spoken_lines.pitch_hz(clip, 16000) for clip in clips[:3]]
    assert hz == sorted(hz) and hz[2] > 1.3 * hz[0]
    assert len(clips[3]) > len(clips[4]) > len(clips[5])


# --- speaker ---


def test_prompts_hold_attributes_letters_and_are_filled_up_on_the_left(speaker):
    inputs = speaker.prompts(LINES)
    first, second = inputs["input_ids"].tolist()[:2]
    assert len(first) == 2 + len("open the door") + 1 and first[-1] == second[-1] == SPEECH
    assert second[:10] == [0] * 10 and inputs["attention_mask"][1].tolist() == [0] * 10 + [1] * 6
    assert first[:2] == [3, 8] and second[10:12] == [5, 6]  # low, fast; high, slow
    assert letters("Café — Ünter, 25!") == "cafe unter 25" and letters("日本") == "" == letters("")


def test_sequences_that_failed_are_told_and_nothing_but_speech_is_decoded(speaker):
    ids = torch.tensor([[FIRST_TOKEN + 3, FIRST_TOKEN, END, END], [END, END, END, END], [FIRST_TOKEN, 12, FIRST_TOKEN + 1, END],
                        [FIRST_TOKEN + 1] * 4])  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool()
    rows, failed = speaker.tokens(token_policy.Sampled(ids, mask, torch.zeros(4, 4), torch.arange(4)))
    assert [row.tolist() for row in rows] == [[3, 0], [], [0, 1], [1, 1, 1, 1]] and failed.tolist() == [False, True, True, True]


def test_a_speaker_learns_its_lines_and_is_the_same_after_saving(tokenizer, tmp_path):
    asked = [Line(text, pitch) for text in ("ab", "cd") for pitch in ("low", "high")]
    tokens = [torch.tensor([k, k + 5, k + 10]) for k in range(4)]
    shape = SpeakerShape(width=32, layers=1, heads=2, hidden=64)
    speaker, history = fit_speaker(tokenizer, asked, tokens, steps=80, batch_size=4, seed=0, shape=shape, learning_rate=1e-2)
    assert history[-1]["loss"] < 0.3 < 2 < history[0]["loss"]
    said = speaker.tokens(speaker.sample(asked, temperature=0, max_tokens=8))[0]
    assert [row.tolist() for row in said] == [row.tolist() for row in tokens]
    speaker.card["limits"] = {"pitch": [1.0, 2.0], "rate": [2.0, 1.0]}
    speaker.save(tmp_path / "speaker", note="x")
    again = Speaker.load(tmp_path / "speaker")
    assert again.card["limits"] == speaker.card["limits"] and again.card["note"] == "x"
    repeated = again.tokens(again.sample(asked, temperature=0, max_tokens=8))[0]
    assert all(torch.equal(a, b) for a, b in zip(repeated, said, strict=True))
    with pytest.raises(FileNotFoundError, match=r"Speaker\.save"):
        Speaker.load(tmp_path)
    weights = load_file(tmp_path / "speaker" / "model.safetensors")
    name = next(name for name in weights if name.endswith("norm.weight"))
    for change in ({name: None}, {"model.layers.7.norm.weight": weights[name].clone()}):
        made = {key: value for key, value in (weights | change).items() if value is not None}
        with safe_open(tmp_path / "speaker" / "model.safetensors", "pt") as file:
            save_file(made, tmp_path / "speaker" / "model.safetensors", metadata=file.metadata())
        with pytest.raises(ValueError, match="a damaged folder"):
            Speaker.load(tmp_path / "speaker")


def test_batches_of_like_length_reach_every_line():
    random, lengths = torch.Generator().manual_seed(0), [k % 40 for k in range(200)]
    batches = [like_lengths(lengths, 6, random) for _ in range(300)]
    assert {k for batch in batches for k in batch} == set(range(200)) and all(len(batch) == 6 for batch in batches)
    spread = [max(lengths[k] for k in batch) - min(lengths[k] for k in batch) for batch in batches]
    assert sum(spread) / 300 < 10 and like_lengths([1, 2], 6, random) != []


# --- what reads tokens ---


def test_the_text_part_is_the_sum_over_all_ctc_paths(reader):
    """Two letters in two tokens: all label paths of four places, summed by hand."""
    line, row = Line("ab"), torch.tensor([1, 2])
    weights, mask = reader.one_hot([row])
    read = reader(weights, mask)[0][0].exp()
    a, b = 1 + LETTERS.index("a"), 1 + LETTERS.index("b")
    total = 0.0
    for path in itertools.product((0, a, b), repeat=4):
        merged = [k for k, _ in itertools.groupby(path) if k]
        total += float(torch.stack([read[place, k] for place, k in enumerate(path)]).prod()) if merged == [a, b] else 0.0
    assert abs(reader.parts(weights, mask, [line])["text"].item() - float(torch.tensor(total).log()) / 2) < 1e-4


def test_a_row_is_worth_the_same_in_any_batch_and_whatever_holds_no_text_is_worth_the_least(reader):
    rows = [torch.tensor([1, 2, 3]), torch.zeros(0, dtype=torch.long), torch.arange(20), torch.tensor([4])]
    asked = [Line("a"), Line("a"), Line(""), Line("abcdefgh")]
    parts = reader.parts(*reader.one_hot(rows), asked)
    for place, (row, line) in enumerate(zip(rows, asked, strict=True)):
        alone = reader.parts(*reader.one_hot([row]), [line])
        assert all(torch.allclose(alone[name][0], parts[name][place], atol=1e-5) for name in parts)
    assert parts["text"][1] == WORST == parts["text"][3] and all(torch.isfinite(part).all() for part in parts.values())
    with pytest.raises(ValueError, match="pitch"):
        mixed(parts, {"loudness": 1.0})


def test_corruption_changes_about_the_share_it_says():
    rows = [torch.arange(24) for _ in range(200)]
    made, right = corrupt(rows, 24, torch.Generator().manual_seed(0))
    assert 0.3 < (right < 1).float().mean() < 0.7 and right.min() >= 0.5
    whole = [torch.equal(new, old) for new, old in zip(made, rows, strict=True)]
    assert all(same for same, share in zip(whole, right.tolist(), strict=True) if share == 1)


def test_a_reader_learns_to_read_and_is_the_same_after_saving(tmp_path):
    words = ["ab", "ba", "aab", "b"]
    asked = [Line(text, pitch) for text in words for pitch in ("low", "high")]
    codes = {"a": 1, "b": 2}
    tokens = [torch.tensor([codes[c] + 10 * (line.pitch == "high") for c in line.text for _ in range(2)]) for line in asked]
    reader, _ = fit_reader(asked, tokens, steps=150, batch_size=8, seed=0, shape=ReaderShape(codes=24, width=16, layers=2),
                           learning_rate=1e-2)  # fmt: skip
    assert sum(a == line.text for a, line in zip(reader.read(tokens), asked, strict=True)) >= 7
    right, wrong = (reader.parts(*reader.one_hot(tokens), other) for other in (asked, asked[2:] + asked[:2]))
    assert (right["text"] > wrong["text"]).all() and (right["pitch"] > -0.7).all()
    reader.save(tmp_path / "reader")
    again = TokenReader.load(tmp_path / "reader")
    after = again.parts(*again.one_hot(tokens), asked)
    assert all(torch.allclose(after[name], right[name], atol=0.3) for name in right)
    with pytest.raises(FileNotFoundError, match=r"TokenReader\.save"):
        TokenReader.load(tmp_path)


# --- reinforcement ---


def forced(speaker, asked, rows):
    ids, mask = speaker.targets(rows)
    inputs = speaker.prompts(asked)
    return token_policy.token_logits(speaker.model, inputs, ids), ids, mask & (ids >= FIRST_TOKEN)


def test_diffro_sends_a_gradient_to_the_speaker_and_none_to_the_reader(speaker, reader):
    logits, _, mask = forced(speaker, LINES, [torch.tensor([1, 2, 3, 4])] * 3)
    loss, metrics = rl.diffro_loss(logits, None, mask, reader, LINES, weights={"text": 1.0, "pitch": 0.5}, temperature=1.0,
                                   beta=0.0, generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in speaker.model.parameters())
    assert all(p.grad is None for p in reader.parameters())
    assert abs(loss.item() + metrics["soft_text"] + 0.5 * metrics["soft_pitch"]) < 1e-5


def test_the_kl_of_diffro_is_that_of_the_distributions_and_0_at_the_start(speaker, reader):
    logits, _, mask = forced(speaker, LINES, [torch.tensor([1, 2]), torch.tensor([1, 2, 3]), torch.tensor([4])])
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    arguments = {"weights": {"text": 1.0}, "temperature": 1.0, "beta": 2.0}
    found = [rl.diffro_loss(logits, ref, mask, reader, LINES, **arguments, generator=torch.Generator().manual_seed(0))
             for ref in (logits, other)]  # fmt: skip
    categorical = torch.distributions.Categorical
    kl = torch.distributions.kl_divergence(categorical(logits=logits), categorical(logits=other))
    by_hand = torch.stack([row[real].mean() for row, real in zip(kl, mask, strict=True)]).mean()
    assert abs(found[0][1]["diffro_kl"]) < 1e-6 and abs(found[1][1]["diffro_kl"] - by_hand) < 1e-4
    assert torch.allclose(found[1][0] - found[0][0], 2.0 * by_hand, atol=1e-4)


def test_diffro_raises_the_reward_on_a_toy(tokenizer):
    """A reader that likes low pitch where code 5 is said: with nothing but its gradient the speaker comes to say it."""
    speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
    asked, rows = [Line("a", "low")] * 4, [torch.tensor([1, 2, 3, 4])] * 4

    class LikesFive(TokenReader):
        def parts(self, weights, mask, lines):
            share = weights[..., 5].sum(1) / mask.sum(1)
            return {"text": share, "pitch": share, "rate": share, "quality": share}

    judge, random = LikesFive(ReaderShape(codes=24)), torch.Generator().manual_seed(0)
    optimizer, shares = torch.optim.AdamW(speaker.model.parameters(), lr=3e-3), []
    for _ in range(60):
        logits, _, mask = forced(speaker, asked, rows)
        loss, metrics = rl.diffro_loss(logits, None, mask, judge, asked, weights={"text": 1.0}, temperature=1.0, beta=0.0,
                                       generator=random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(metrics["soft_text"])
    assert sum(shares[:5]) / 5 < 0.15 and sum(shares[-5:]) / 5 > 0.9


def test_blurred_tokens_are_speech_and_what_is_no_speech_stays():
    ids = torch.cat([torch.arange(FIRST_TOKEN).repeat(4, 1), torch.full((4, 500), FIRST_TOKEN + 3)], dim=1)
    made = blurred(ids, 24, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(made[:, :FIRST_TOKEN], ids[:, :FIRST_TOKEN])
    speech = made[:, FIRST_TOKEN:] - FIRST_TOKEN
    assert speech.min() >= 0 and speech.max() < 24
    assert float((speech != 3).float().mean()) == pytest.approx(0.3 * 23 / 24, abs=0.03)
    assert torch.equal(made, blurred(ids, 24, 0.3, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("objective", ["grpo", "diffro", "both"])
@pytest.mark.parametrize("filtering", [False, True])
def test_every_objective_trains_and_repeats_with_its_seed(tokenizer, reader, objective, filtering):
    config = replace(CONFIG, objective=objective, filtering=filtering, min_spread=0.0)
    runs = []
    for _ in range(2):
        speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
        start = {name: value.clone() for name, value in speaker.model.state_dict().items()}
        runs.append(rl.train(speaker, reader, long_is_good, LINES, config, seed=4))
        moved = any(not torch.equal(value, start[name]) for name, value in speaker.model.state_dict().items())
        assert moved or all(row["skipped"] for row in runs[-1])
    assert str(runs[0]) == str(runs[1])
    assert all(row["first_ratio_deviation"] < 1e-4 for row in runs[0])
    assert all(row["kept"] == 1 for row in runs[0]) or filtering


@pytest.mark.parametrize("objective", ["grpo", "diffro"])
def test_the_reader_shares_the_policys_turn_only_where_its_gradient_is_wanted(tokenizer, reader, objective):
    speaker, moves = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1), Timeline()
    config = replace(CONFIG, objective=objective, filtering=False, steps=1, beta=0.1)
    rl.train(speaker, reader, long_is_good, LINES, config, seed=4, timeline=moves)
    here, sets = set(), []
    for row in moves:
        here = here | {row["part"]} if row["action"] == "load" else here - {row["part"]}
        sets.append(here)
    learning = {"policy", "optimizer"} | ({"reader"} if objective == "diffro" else set())
    assert learning in sets and all(one <= learning for one in sets if "optimizer" in one)
    assert learning == sets[-1] and {"reference"} in sets and not any({"reference", "reader"} <= one for one in sets)
    assert max(row["resident"] for row in moves) < moves[-1]["everything"]


def kept_round(speaker, rows):
    """What is learnt from these rows of speech tokens, a line each, with advantages and a reference that is not the policy."""
    ids, mask = speaker.targets(rows)
    asked = [LINES[k % 3] for k in range(len(rows))]
    logits = token_policy.token_logits(speaker.model, speaker.prompts(asked), ids).detach()
    random = torch.Generator().manual_seed(2)
    known = logits + 0.5 * torch.randn(logits.shape, generator=random)
    old = rl._chosen(logits, ids, mask) + 0.1 * torch.randn(ids.shape, generator=random) * mask
    advantages = torch.randn(len(rows), generator=random, dtype=torch.float64)
    return rl.Kept(asked, ids, mask, mask & (ids >= FIRST_TOKEN), advantages, old, known)


def soft(logits, *, temperature, generator):
    return (logits / temperature).softmax(-1)


@pytest.mark.parametrize("objective", ["grpo", "diffro", "both"])
def test_gradients_of_parts_add_up_to_that_of_the_whole(speaker, reader, monkeypatch, objective):
    monkeypatch.setattr(rl, "gumbel_softmax", soft)  # without draws, which parts would make in another order
    kept = kept_round(speaker, [torch.tensor(row) for row in ([1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10])])
    turns, found = rl.taking_turns(speaker, reader), []
    stepped = lambda model, *_: float(sum(p.grad.abs().sum() for p in model.parameters()))  # noqa: E731
    monkeypatch.setattr(rl, "optimizer_step", stepped)
    for most in (0, 2, 1):
        speaker.model.zero_grad()
        config = replace(CONFIG, objective=objective, micro_batch=most, beta=0.1)
        with turns.take("policy", "reader"):
            metrics = rl._step(speaker, None, reader, kept, config, 1.0, None, turns)
        found.append(([p.grad.clone() for p in speaker.model.parameters()], metrics))
    assert found[0][1]["grad_norm"] > 0
    for gradients, metrics in found[1:]:
        for one, whole in zip(gradients, found[0][0], strict=True):
            torch.testing.assert_close(one, whole, atol=1e-6, rtol=1e-4)
        same = [key for key in metrics if key != "clip_fraction"]  # of tokens, where the others are of sequences
        assert {key: metrics[key] for key in same} == pytest.approx({key: found[0][1][key] for key in same}, abs=1e-3)


def test_the_gradient_of_a_round_is_that_of_its_update_without_the_kl_and_leaves_no_trace(speaker, reader):
    before = [p.clone() for p in speaker.model.parameters()]
    for objective in ("grpo", "diffro"):
        config = replace(CONFIG, objective=objective, filtering=False, epochs=1, max_grad_norm=1e9, beta=0.5)
        found, *shuffled = rl.round_gradients(speaker, reader, long_is_good, LINES, config, seed=3, shuffles=2)
        assert all(row.norm() > 0 and not torch.equal(row, found) for row in shuffled) and not torch.equal(*shuffled)
        found = found[None]
        assert torch.equal(found, rl.round_gradients(speaker, reader, long_is_good, LINES, replace(config, beta=0.0), seed=3))
        in_parts = rl.round_gradients(speaker, reader, long_is_good, LINES, replace(config, micro_batch=9), seed=3)
        assert torch.equal(found, in_parts) and found.norm() > 0
        assert all(p.grad is None and torch.equal(p, old) for p, old in zip(speaker.model.parameters(), before, strict=True))
        other = rl.round_gradients(speaker, reader, long_is_good, LINES, config, seed=4)
        assert abs(torch.nn.functional.cosine_similarity(found, other)) < 0.9
    with pytest.raises(ValueError, match="nothing was kept"):
        rl.round_gradients(speaker, reader, silent, LINES, replace(CONFIG, objective="grpo", filtering=True), seed=3)


def test_both_objectives_together_carry_one_kl(speaker, reader, monkeypatch):
    monkeypatch.setattr(rl, "gumbel_softmax", soft)
    kept, losses = kept_round(speaker, [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]), {}
    for objective in ("grpo", "diffro", "both"):
        for beta in (0.0, 0.5):
            config = replace(CONFIG, objective=objective, beta=beta)
            losses[objective, beta] = rl.part_loss(speaker, reader, kept, slice(0, 2), config, 1.0, None)[0].item()
    added = {name: losses[name, 0.5] - losses[name, 0.0] for name in ("grpo", "diffro", "both")}
    assert added["both"] == pytest.approx(added["grpo"], abs=1e-6) and min(added.values()) > 0.01
    assert losses["both", 0.0] == pytest.approx(losses["grpo", 0.0] + CONFIG.diffro_weight * losses["diffro", 0.0], abs=1e-5)


@pytest.mark.parametrize("objective", ["grpo", "both"])
def test_in_bfloat16_and_in_parts_the_first_ratio_is_1(tokenizer, reader, objective):
    speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
    config = replace(CONFIG, objective=objective, filtering=False, precision="bf16", micro_batch=4, beta=0.1)
    history = rl.train(speaker, reader, long_is_good, LINES, config, seed=4)
    assert all(row["first_ratio_deviation"] == 0 and row["kl"] >= 0 and row["grad_norm"] > 0 for row in history)
    assert all(p.dtype == torch.float32 for p in speaker.model.parameters())


def test_a_cooler_policy_begins_at_ratio_1_too(tokenizer, reader):
    speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
    config = replace(CONFIG, objective="grpo", filtering=False, temperature=0.5, epochs=1)
    history = rl.train(speaker, reader, long_is_good, LINES, config, seed=4)
    assert all(row["first_ratio_deviation"] < 1e-4 and row["skipped"] == 0 for row in history)


def test_a_groups_spread_is_that_of_its_text(speaker, reader, monkeypatch):
    """Samples that are heard alike teach nothing, however the reader likes their sound."""
    monkeypatch.setattr(Speaker, "tokens", lambda self, sampled: ([torch.tensor([k, k + 1]) for k in range(len(sampled.ids))],
                                                                  torch.zeros(len(sampled.ids), dtype=torch.bool)))
    config, random, turns = replace(CONFIG, objective="grpo", filtering=True), torch.Generator(), rl.taking_turns(speaker, reader)
    spoken = rl.roll_out(speaker, reader, silent, LINES[:2], config, random, turns)
    assert spoken.rewards.std() > 0 and spoken.dropped == {"failed": 0, "length": 0, "spread": 6} and not spoken.keep.any()


def test_a_round_without_speech_teaches_diffro_nothing_and_is_skipped(speaker, reader):
    ids, mask = torch.full((4, 1), END), torch.ones(4, 1, dtype=torch.bool)
    sampled = token_policy.Sampled(ids, mask, torch.zeros(4, 1), torch.tensor([0, 0, 1, 1]))
    zeros = torch.zeros(4)
    spoken = rl.Spoken(sampled, [], mask[:, 0], [LINES[0]] * 4, zeros, {}, mask[:, 0], {}, zeros.double(), None)
    optimizer, random = rl.make_optimizer(speaker.model, 1e-3), torch.Generator()
    turns = rl.taking_turns(speaker, reader, optimizer=optimizer)
    for objective, skipped in (("diffro", 1.0), ("both", 0.0)):
        found = rl.update(speaker, None, optimizer, reader, spoken, replace(CONFIG, objective=objective), 1.0, random, turns)
        assert found["skipped"] == skipped and all(value == value for value in found.values())


def test_a_resumed_training_has_the_timeline_of_the_first(tokenizer, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "SAVE_EVERY", 1)
    config, moves = replace(CONFIG, filtering=False, steps=3), [Timeline() for _ in range(4)]

    def trained(timeline, **options):
        speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
        return rl.train(speaker, reader, long_is_good, LINES, config, seed=4, timeline=timeline, **options)

    def stop(i, metrics, spoken):
        if i == 2:
            raise KeyboardInterrupt

    history, state = trained(moves[0]), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(moves[1], checkpoint=state, callback=stop)
    assert trained(moves[2], checkpoint=state) == history == trained(moves[3], checkpoint=state)
    assert moves[2][:12] == moves[0][:12] and moves[3] == moves[2]


def test_grpo_raises_the_reward_it_is_given(tokenizer, reader):
    speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
    config = replace(CONFIG, objective="grpo", filtering=False, steps=25, group_size=8, learning_rate=1e-2, beta=0.0,
                     warmup_steps=0, attribute_weight=0.0, quality_weight=0.0, max_tokens=16)
    history = rl.train(speaker, reader, long_is_good, LINES, config, seed=0)
    assert history[-1]["tokens"] > history[0]["tokens"] + 2


def test_filtering_drops_what_failed_and_counts_it(speaker, reader):
    """An untrained speaker emits letters among its tokens: nearly all decodes have failed."""
    random = torch.Generator().manual_seed(0)
    turns = rl.taking_turns(speaker, reader)
    spoken = rl.roll_out(speaker, reader, long_is_good, LINES, replace(CONFIG, filtering=True), random, turns)
    assert spoken.dropped["failed"] == int(spoken.failed.sum()) > 0
    assert int((~spoken.keep).sum()) == sum(spoken.dropped.values()) and not (spoken.keep & spoken.failed).any()
    assert (spoken.advantages[~spoken.keep] == 0).all()
    row = rl.round_metrics(spoken)
    assert abs(row["kept"] + sum(value for key, value in row.items() if key.startswith("dropped_")) - 1) < 1e-6


def test_bad_input_has_a_defined_reward_and_ends_no_training(tokenizer, reader):
    """Empty and non-ASCII texts, decodes of nothing, and a recogniser that hears nothing."""
    speaker = Speaker.new(tokenizer, SpeakerShape(width=16, layers=1, heads=2, hidden=32), seed=1)
    with torch.no_grad():  # the end token comes at once in most sequences
        speaker.model.model.norm.weight.mul_(0.0)
    asked = [Line(""), Line("日本"), Line("open the door")]
    history = rl.train(speaker, reader, silent, asked, replace(CONFIG, lines_per_step=3, filtering=False), seed=0)
    assert len(history) == 2 and all(value == value for row in history for value in row.values())
    rewards, parts, clips = rl.judged(speaker, reader, silent, [torch.zeros(0, dtype=torch.long)] * 3, asked, CONFIG)
    assert parts["text"].tolist() == [1.0, 0.0, 0.0] and torch.isfinite(rewards).all() and all(len(clip) == 0 for clip in clips)


def test_errors_name_what_to_do(speaker, reader):
    with pytest.raises(ValueError, match="only 3 lines"):
        rl.train(speaker, reader, silent, LINES, replace(CONFIG, lines_per_step=4))
    with pytest.raises(ValueError, match="trained with it"):
        rl.train(speaker, TokenReader(ReaderShape(codes=8)), silent, LINES, CONFIG)
    with pytest.raises(ValueError, match="group_size=1"):
        replace(CONFIG, group_size=1)


def test_both_are_built_where_one_is_nowhere_and_a_resumed_run_gives_the_histories_back(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    from resonate_lib import runs

    config = SpeakerConfig(train_lines=8, tokenizer_steps=2, tokenizer_batch_size=4, codes=24, steps=2, batch_size=4, width=16,
                           layers=1, heads=2, reader_steps=2, reader_batch_size=4)  # fmt: skip
    run = runs.Run(path=tmp_path / "run", profile="smoke", seed=0, notebook="10_test", from_scratch=True)
    assert build.to_build(run) == ["speaker", "speech_reward"]
    folders = {name: run.checkpoint(name) for name in build.NAMES}
    states = {name: run.state(name) for name in ("tokenizer", *build.NAMES)}
    histories = build.build(config, folders, seed=0, states=states)
    monkeypatch.setattr(build, "natural", None)  # nothing is spoken again
    assert build.build(config, folders, seed=0, states=states) == histories
    speaker, reader = Speaker.load(folders["speaker"]), TokenReader.load(folders["speech_reward"])
    assert speaker.codes == reader.shape.codes == 24 and set(speaker.card["limits"]) == {"pitch", "rate"}
    size = sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir())
    assert size < 600_000


# --- evaluation ---


def test_word_errors_and_their_summary_by_hand():
    pairs = (("open a door now", "Open the door."), ("", "open"), ("oh no", ""))
    found = [synthesis_eval.word_errors(*pair) for pair in pairs]
    assert [(one["errors"], one["words"]) for one in found] == [(2, 3), (1, 1), (2, 0)]

    class Ear:
        def transcribe(self, audio, sample_rate):
            return [said[len(clip)] for clip in audio]

    clips = [torch.zeros(0), torch.zeros(1600), tones(1)[0]]
    said = dict(zip(map(len, clips), ("open the door", "", "call anna"), strict=True))
    limits = {"pitch": [100.0, 200.0], "rate": [0.1, 0.05]}
    good = synthesis_eval.judge_clips("good", clips, LINES, {"judge": Ear()}, limits, 16000)
    bad = good.assign(system="bad", errors_judge=good["errors_judge"] + 1)
    table = synthesis_eval.summary(pd.concat([good, bad]), ears=["judge"], base="good", n=200).set_index("system")
    assert good["errors_judge"].tolist() == [0, 1, 0] and abs(table.loc["good", "wer_judge"] - 1 / 6) < 1e-9
    assert abs(table.loc["bad", "change_judge"] - 0.5) < 1e-9 and table.loc["bad", "change_judge_low"] > 0
    assert len(synthesis_eval.bars(table.reset_index(), ["wer_judge"])) == 2
    assert table.loc["bad", "pitch_right_change"] == 0 and table.loc["good", "lines"] == 3


def test_clips_of_one_line_are_no_more_lines():
    """Sixteen clips of four lines: the interval is that of four lines, and several seeds are a second level."""
    def rows(seed):
        wrong = [0, 0, 2, 4] * 4
        same = {"system": "base", "seed": seed, "words": 4, "pitch_right": 1.0, "rate_right": 1.0}
        return pd.DataFrame([{**same, "id": k, "line": f"line {k % 4}", "errors_judge": wrong[k]} for k in range(16)])

    found = synthesis_eval.summary(rows(0), ears=["judge"], base="base", n=500).iloc[0]
    four, sixteen = (stats.bootstrap_ratio([0, 0, 2, 4] * count, [4] * 4 * count, n=500) for count in (1, 4))
    assert (found["wer_judge_low"], found["wer_judge_high"]) == (four.low, four.high) and found["lines"] == 4
    assert four.high - four.low > 1.5 * (sixteen.high - sixteen.low)
    several = pd.concat([rows(0), rows(1).assign(errors_judge=4)])
    assert synthesis_eval.summary(several, ears=["judge"], base="base", n=500).iloc[0]["wer_judge_high"] == 1.0
    assert synthesis_eval.jumps([{"reward_mean": 0.0}, {"reward_mean": 1.0}, {"reward_mean": 0.5}]) == 0.75
