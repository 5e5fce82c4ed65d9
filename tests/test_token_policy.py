"""Language models as policies: against torch.distributions, exact enumeration and hand computation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from resonate_lib.online import group_advantages
from resonate_lib.speech import token_policy as tp

END, VOCABULARY = 0, 7


@pytest.fixture(scope="module")
def model():
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=END, initializer_range=0.4, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def prompts():
    """Three prompts of 4, 2 and 3 tokens, filled up on the left."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6], [0, 3, 1, 2]])
    return {"input_ids": ids, "attention_mask": mask}


def drawn(model, prompts, seed=3, **options):
    settings = {"group_size": 5, "max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0} | options
    return tp.sample(model, prompts, generator=torch.Generator().manual_seed(seed), **settings)


def by_hand(model, prompts, row, tokens):
    """Log-probability of each token, one forward of the unpadded sequence a token, by Categorical."""
    sequence = prompts["input_ids"][row][prompts["attention_mask"][row].bool()].tolist()
    found = []
    for token in tokens:
        logits = model(input_ids=torch.tensor([sequence])).logits[0, -1]
        found.append(torch.distributions.Categorical(logits=logits).log_prob(torch.tensor(token)).item())
        sequence.append(token)
    return found


@torch.no_grad()
def test_log_probs_equal_categorical_at_sampling_and_by_teacher_forcing(model, prompts):
    got = drawn(model, prompts)
    again = tp.token_log_probs(model, prompts, got.ids, got.mask)
    assert got.ids.shape == got.mask.shape == got.log_probs.shape == again.shape == (15, got.ids.shape[1])
    assert got.group_ids.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for row in range(15):
        tokens = got.ids[row][got.mask[row]].tolist()
        expected = torch.tensor(by_hand(model, prompts, row // 5, tokens))
        torch.testing.assert_close(got.log_probs[row][got.mask[row]], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(again[row][got.mask[row]], expected, atol=1e-5, rtol=0)
    assert (again - got.log_probs).exp().sub(1).abs().max() < 1e-4  # the first ratio of an update


@torch.no_grad()
def test_tempered_samples_are_scored_at_their_temperature(model, prompts):
    got = drawn(model, prompts, temperature=0.6)
    again = tp.token_log_probs(model, prompts, got.ids, got.mask, temperature=0.6)
    assert (again - got.log_probs).exp().sub(1).abs().max() < 1e-4
    chances = torch.distributions.Categorical(logits=tp.token_logits(model, prompts, got.ids) / 0.6)
    torch.testing.assert_close(again, chances.log_prob(got.ids) * got.mask, atol=1e-5, rtol=0)
    assert (tp.token_log_probs(model, prompts, got.ids, got.mask) - again).abs().max() > 0.1


@torch.no_grad()
def test_mask_ends_with_the_first_end_token_and_the_rest_is_filled(model, prompts):
    got = drawn(model, prompts, group_size=40)
    for ids, mask, log_probs in zip(got.ids.tolist(), got.mask.tolist(), got.log_probs.tolist(), strict=True):
        end = ids.index(END) + 1 if END in ids else len(ids)
        assert mask == [True] * end + [False] * (len(ids) - end)
        assert all(token == END for token in ids[end:]) and all(value == 0 for value in log_probs[end:])
    lengths = got.mask.sum(-1)
    assert lengths.min() < lengths.max() <= 8


@torch.no_grad()
def test_draws_come_from_the_generator_alone(model, prompts):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(model, prompts)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second, other = drawn(model, prompts), drawn(model, prompts, seed=4)
    assert torch.equal(first.ids, second.ids) and torch.equal(first.log_probs, second.log_probs)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


@torch.no_grad()
def test_frequencies_follow_the_distribution_tempered_and_cut(model, prompts):
    one = {name: tensor[:1] for name, tensor in prompts.items()}
    chance = model(**one).logits[0, -1].double().softmax(-1)
    plain = drawn(model, one, group_size=4000, max_new_tokens=1).ids[:, 0].bincount(minlength=VOCABULARY) / 4000
    assert (plain - chance).abs().max() < 4 * 0.5 / math.sqrt(4000)
    tempered = chance**2 / (chance**2).sum()
    cold = drawn(model, one, group_size=4000, max_new_tokens=1, temperature=0.5).ids[:, 0].bincount(minlength=VOCABULARY) / 4000
    assert (cold - tempered).abs().max() < 4 * 0.5 / math.sqrt(4000)
    order = chance.argsort(descending=True)
    count = next(k for k in range(1, VOCABULARY + 1) if chance[order[:k]].sum() >= 0.6)
    nucleus = drawn(model, one, group_size=2000, max_new_tokens=1, top_p=0.6)
    assert set(nucleus.ids[:, 0].tolist()) == set(order[:count].tolist())
    torch.testing.assert_close(nucleus.log_probs[:, 0].double(), chance.log()[nucleus.ids[:, 0]], atol=1e-5, rtol=0)  # of the whole


@torch.no_grad()
def test_greedy_is_what_generate_gives(model, prompts):
    expected = model.generate(**prompts, max_new_tokens=8, do_sample=False)[:, 4:]
    got = tp.sample(model, prompts, group_size=1, max_new_tokens=8, temperature=0.0)
    assert torch.equal(got.ids, expected[:, : got.ids.shape[1]])


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=9), st.floats(0, 1, exclude_max=True), st.floats(0.05, 1.0))
@settings(max_examples=60, deadline=None)
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(values, uniform, top_p):
    logits = torch.tensor([values], dtype=torch.float64)
    token = tp.draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_p=top_p).item()
    chance = logits[0].softmax(-1)
    larger = chance[chance > chance[token]].sum()
    assert larger < top_p + 1e-9  # it belongs to the nucleus
    if top_p == 1.0:
        below = chance[:token].sum()
        assert below - 1e-9 <= uniform <= below + chance[token] + 1e-9


def test_grpo_loss_by_hand():
    new = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.7, -0.9]], requires_grad=True)
    old = torch.tensor([[-1.2, -2.0, 0.0], [-0.5, -1.2, -0.4]])
    ref = torch.tensor([[-1.1, -1.5, 0.0], [-0.5, -0.7, -1.0]])
    mask, adv = torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([2.0, -1.0], dtype=torch.float64)
    loss, metrics = tp.grpo_loss(new, old, ref, mask, adv, clip_range=0.1, beta=0.5)
    total, kls = [], []
    for i, j in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        r = math.exp(new[i, j].item() - old[i, j].item())
        difference = ref[i, j].item() - new[i, j].item()
        kls.append(math.exp(difference) - difference - 1)
        total.append(max(-adv[i].item() * r, -adv[i].item() * min(max(r, 0.9), 1.1)) + 0.5 * kls[-1])
    assert loss.item() == pytest.approx(0.5 * (sum(total[:2]) / 2 + sum(total[2:]) / 3), abs=1e-6)
    assert metrics["kl"] == pytest.approx(0.5 * (sum(kls[:2]) / 2 + sum(kls[2:]) / 3), abs=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(3 / 5)
    loss.backward()
    assert new.grad[0, 2] == 0  # outside the mask
    assert new.grad[0, 0] != 0 and torch.isfinite(new.grad).all()


def test_k3_is_the_kl_on_average():
    new, ref = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    categorical = torch.distributions.Categorical
    exact = torch.distributions.kl_divergence(categorical(logits=new), categorical(logits=ref))
    assert (new.exp() * tp.kl_tokens(new, ref)).sum().item() == pytest.approx(exact.item(), rel=1e-9)
    assert (tp.kl_tokens(new, ref) >= 0).all() and (tp.kl_tokens(new, new) == 0).all()


def test_the_gradient_is_that_of_the_expected_reward_by_enumeration(model, prompts):
    """All sequences of up to two tokens with their probabilities: the loss' gradient, weighed so, is minus that of E[reward]."""
    one = {name: tensor[1:2] for name, tensor in prompts.items()}
    pairs = [(END, END), *itertools.product(range(1, VOCABULARY), range(VOCABULARY))]
    ids = torch.tensor(pairs)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 1] = False
    reward = torch.rand(len(ids), generator=torch.Generator().manual_seed(5))
    log_probs = tp.token_log_probs(model, one, ids, mask)
    chance = log_probs.sum(-1).exp()
    assert chance.sum().item() == pytest.approx(1.0, abs=1e-5)
    exact = torch.autograd.grad(-(chance * reward).sum(), list(model.parameters()), retain_graph=True)
    tokens = mask.sum(-1)  # the loss is a mean over tokens: the advantage takes their number back
    weights = len(ids) * chance.detach() * tokens * (reward - 0.3)  # any baseline
    loss, _ = tp.grpo_loss(log_probs, log_probs.detach(), None, mask, weights, clip_range=0.2, beta=0.0)
    got = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


def test_sampled_gradients_point_where_the_exact_one_does(model, prompts):
    one = {name: tensor[1:2] for name, tensor in prompts.items()}
    worth = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(6))
    head = model.get_output_embeddings().weight
    chance = model(**one).logits[0, -1].softmax(-1)
    exact = torch.autograd.grad(-(chance * worth).sum(), head)[0]
    got = drawn(model, one, group_size=3000, max_new_tokens=1)
    adv = group_advantages(worth[got.ids[:, 0]], got.group_ids, global_std=False)
    new = tp.token_log_probs(model, one, got.ids, got.mask)
    loss, metrics = tp.grpo_loss(new, got.log_probs, None, got.mask, adv, clip_range=0.2, beta=0.0)
    sampled = torch.autograd.grad(loss, head)[0]
    assert torch.cosine_similarity(sampled.flatten(), exact.flatten(), dim=0) > 0.99
    assert metrics["ratio_deviation"] < 1e-4


def test_entropy_is_that_of_the_distributions(model, prompts):
    got = drawn(model, prompts)
    with torch.no_grad():
        logits = tp.token_logits(model, prompts, got.ids)
    each = torch.distributions.Categorical(logits=logits).entropy()
    expected = torch.stack([row[kept].mean() for row, kept in zip(each, got.mask, strict=True)])
    torch.testing.assert_close(tp.sequence_entropy(logits, got.mask), expected, atol=1e-5, rtol=0)


def test_errors_say_what_is_allowed(model, prompts):
    with pytest.raises(ValueError, match="top_p=0: the first two are"):
        drawn(model, prompts, top_p=0)
    with pytest.raises(ValueError, match="without a generator"):
        tp.sample(model, prompts, group_size=2, max_new_tokens=2, temperature=1.0, top_p=1.0)
    right = prompts | {"attention_mask": prompts["attention_mask"].flip(-1)}
    with pytest.raises(ValueError, match="on the left"):
        drawn(model, right)
    with pytest.raises(ValueError, match="4 sequences of 2 tokens for 3 prompts"):
        tp.token_log_probs(model, prompts, torch.ones(4, 2, dtype=torch.long), torch.ones(4, 2))
