"""Differentiable rewards: the Gumbel-Softmax gradient against enumeration and REINFORCE, sample filtering by hand."""

import itertools

import pytest
import torch
from torch.nn.functional import one_hot

from resonate_lib import diffro

# ------------------------------------------------------------------------------------- Gumbel-Softmax
LENGTH, WORDS = 3, 4


def toy():
    """Logits of three tokens out of four, and a reward of their one-hot rows with pairs that go well together."""
    draw = torch.Generator().manual_seed(5)
    logits, single = torch.randn(LENGTH, WORDS, generator=draw), torch.randn(LENGTH, WORDS, generator=draw)
    pair = 0.3 * torch.randn(LENGTH - 1, WORDS, WORDS, generator=draw)

    def reward(rows):  # (n, LENGTH, WORDS) -> (n,)
        alone = (rows * single).sum((1, 2))
        together = torch.einsum("nlv,lvw,nlw->n", rows[:, :-1], pair, rows[:, 1:])
        return torch.sigmoid(alone + together)

    return logits, reward


def exact_gradient(logits, reward):
    logits = logits.clone().requires_grad_(True)
    every = torch.tensor(list(itertools.product(range(WORDS), repeat=LENGTH)))
    log_p = logits.log_softmax(-1)[range(LENGTH), every].sum(1)
    return torch.autograd.grad((log_p.exp() * reward(one_hot(every, WORDS).float())).sum(), logits)[0]


def gumbel_gradients(logits, reward, n, temperature):
    copies = logits.expand(n, -1, -1).clone().requires_grad_(True)
    rows = diffro.gumbel_softmax(copies, temperature=temperature, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(reward(rows).sum(), copies)[0]


def reinforce_gradients(logits, reward, n):
    ids = torch.multinomial(logits.softmax(-1), n, replacement=True, generator=torch.Generator().manual_seed(1)).T
    scores = reward(one_hot(ids, WORDS).float())
    return (scores - scores.mean())[:, None, None] * (one_hot(ids, WORDS) - logits.softmax(-1))


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_the_gradient_points_where_enumeration_and_reinforce_point_and_scatters_less():
    logits, reward = toy()
    exact, n = exact_gradient(logits, reward), 100_000
    reinforce, straight = reinforce_gradients(logits, reward, n), gumbel_gradients(logits, reward, n, 1.0)
    assert cosine(reinforce.mean(0), exact) > 0.999  # so many samples are as good as the truth
    to_exact, to_reinforce = cosine(straight.mean(0), exact), cosine(straight.mean(0), reinforce.mean(0))
    spread, of_reinforce = straight.var(0).sum().item(), reinforce.var(0).sum().item()
    print(f"cosine {to_exact:.3f} to enumeration, {to_reinforce:.3f} to REINFORCE; variance {spread:.4f}, {of_reinforce:.4f}")
    assert min(to_exact, to_reinforce) >= 0.9 and spread < of_reinforce


def test_draws_follow_the_softmax_exactly_and_come_from_the_generator():
    logits, _ = toy()
    many = logits.expand(40_000, -1, -1)
    rows = diffro.gumbel_softmax(many, temperature=0.3, generator=torch.Generator().manual_seed(2))
    assert ((rows == 0) | (rows == 1)).all() and (rows.sum(-1) == 1).all()
    torch.testing.assert_close(rows.mean(0), logits.softmax(-1), atol=0.01, rtol=0)
    again = diffro.gumbel_softmax(many, temperature=2.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows, again)  # the same noise: the temperature is the gradient's alone
    other = diffro.gumbel_softmax(many, temperature=0.3, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(rows, other)


def test_soft_weights_are_the_formula_and_carry_the_gradient_of_the_hard_ones():
    logits = toy()[0].double().requires_grad_(True)
    draws = [torch.Generator().manual_seed(4) for _ in range(3)]
    noise = -torch.empty(LENGTH, WORDS).exponential_(generator=draws[0]).log()
    soft = diffro.gumbel_softmax(logits, temperature=0.5, hard=False, generator=draws[1])
    torch.testing.assert_close(soft, ((logits + noise) * 2).softmax(-1))
    hard, weight = diffro.gumbel_softmax(logits, temperature=0.5, generator=draws[2]), torch.arange(4.0).double()
    gradients = [torch.autograd.grad((rows * weight).sum(), logits, retain_graph=True)[0] for rows in (soft, hard)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="temperature=0: must be above 0"):
        diffro.gumbel_softmax(logits, temperature=0, generator=draws[0])


def test_the_temperature_falls_by_equal_ratios():
    assert [diffro.temperature_at(i, 3, 2.0, 0.5) for i in range(4)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    assert diffro.temperature_at(0, 1, 2.0, 0.5) == 2.0


# ------------------------------------------------------------------------------------------ filtering
def keep(rewards, groups, **options):
    options = {"min_spread": 0.0, "length_deviations": 3.0} | options
    mask, reasons = diffro.keep_groups(torch.tensor(rewards), torch.tensor(groups), **options)
    return mask.long().tolist(), reasons


def test_groups_that_tie_or_hold_one_alone_are_left_out():
    mask, reasons = keep([0.1, 0.1, 0.2, 0.4, 0.9], [3, 3, 7, 7, 9])
    assert mask == [0, 0, 1, 1, 0] and reasons == {"failed": 0, "length": 0, "spread": 3}
    assert keep([0.25, 0.75], [0, 0], min_spread=0.25) == ([0, 0], {"failed": 0, "length": 0, "spread": 2})  # deviation 0.25
    assert keep([0.25, 0.75], [0, 0], min_spread=0.24)[0] == [1, 1]


def test_outlier_lengths_are_those_far_from_the_median_of_their_own_group():
    # group 0: median 11, distances 1 1 0 2 29, median distance 1, deviation 1.4826: beyond 3 deviations lies 40 alone
    lengths = torch.tensor([10, 12, 11, 13, 40, 40, 40, 41])
    mask, reasons = keep([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 0, 0, 0, 0, 1, 1, 1], lengths=lengths)
    assert mask == [1, 1, 1, 1, 0, 1, 1, 1] and reasons == {"failed": 0, "length": 1, "spread": 0}
    # equal siblings: a deviation is 5 % of the median, 1 token of 20; 23 is three of them, 24 too many
    for last, kept in ((23, 1), (24, 0)):
        assert keep([0.1, 0.2, 0.3, 0.4], [0] * 4, lengths=torch.tensor([20, 20, 20, last]))[0] == [1, 1, 1, kept]


def test_failed_decodes_go_first_and_do_not_count_in_the_median_or_the_spread():
    failed = torch.tensor([False, True, False, False, False, False])
    lengths = torch.tensor([10, 900, 10, 10, 10, 10])
    mask, reasons = keep([0.5, 0.0, 0.5, 0.1, 0.3, float("nan")], [0, 0, 0, 1, 1, 1], lengths=lengths, failed=failed)
    assert mask == [0, 0, 0, 1, 1, 0] and reasons == {"failed": 2, "length": 0, "spread": 2}
    assert keep([float("nan")] * 2, [0, 0], lengths=torch.tensor([1, 2])) == ([0, 0], {"failed": 2, "length": 0, "spread": 0})
