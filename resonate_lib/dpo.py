"""Offline preference learning for flows: pairs made once by the frozen reference, then flow-DPO, with CRPO's extra
term if asked.

Sources: Diffusion-DPO (arXiv 2311.12908) in its flow form as in the published Resonate code; CRPO from TangoFlux
(arXiv 2412.21037). Differs from the published code: ties are dropped instead of won by the first clip.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resonate_lib import flow
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.online import (
    SAVE_EVERY,
    check_flow,
    collect,
    draw_seed,
    in_parts,
    learning,
    make_optimizer,
    optimizer_step,
    reference_of,
)
from resonate_lib.progress import told
from resonate_lib.training import autocast, fit, step_generator

PROMPTS_PER_BATCH = 32  # of pair making; bounds memory and does not change the pairs' seeds


class PreferenceLoss(NamedTuple):
    """loss 0-dim; inside (B,) the log-odds that the winner is preferred; accuracy 0-dim, share of inside > 0."""

    loss: Tensor
    inside: Tensor
    accuracy: Tensor


def flow_dpo_loss(
    err_win: Tensor, err_win_ref: Tensor, err_lose: Tensor, err_lose_ref: Tensor, *, beta: float
) -> PreferenceLoss:
    """-mean log sigmoid(inside), inside = -beta/2 ((e_win - e_win_ref) - (e_lose - e_lose_ref)); errors (B,), see
    `velocity_error`.

    At the reference it is ln 2.
    """
    inside = -0.5 * beta * ((err_win - err_win_ref) - (err_lose - err_lose_ref))
    return PreferenceLoss(-F.logsigmoid(inside).mean(), inside, (inside > 0).float().mean())


def crpo_loss(
    err_win: Tensor,
    err_win_ref: Tensor,
    err_lose: Tensor,
    err_lose_ref: Tensor,
    *,
    beta: float,
    sft_weight: float = 1.0,
) -> PreferenceLoss:
    """`flow_dpo_loss` + sft_weight * mean(err_win): the flow-matching loss on winners keeps them likely (TangoFlux:
    weight 1).
    """
    dpo = flow_dpo_loss(err_win, err_win_ref, err_lose, err_lose_ref, beta=beta)
    return dpo._replace(loss=dpo.loss + sft_weight * err_win.mean())


@dataclass
class Pairs:
    """P preferences in network space: win, lose (P, N, C); cond the P prompts; rewards (P, 2) winner first; ties
    dropped before.
    """

    win: Tensor
    lose: Tensor
    cond: Condition
    rewards: Tensor
    prompts: list[str]
    ties: int

    def __len__(self) -> int:
        return len(self.win)


def _prompt_order(records: list[dict], count: int, generator: torch.Generator) -> list[dict]:
    """`count` records, each used once before any is used again."""
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(records), generator=generator).tolist()
    return [records[i] for i in order[:count]]


def make_pairs(generator, network: FluxAudio, reward, records: list[dict], config, *, seed: int = 0) -> Pairs:
    """config.pairs pairs of siblings (one prompt, two noises) sampled by `network` without randomness in the solver;
    ties dropped.

    Winner: the higher reward. Source: the published "offline" sampling (25 Euler steps). ValueError when every pair
    ties.
    """
    if not records:
        raise ValueError("no prompts to make pairs of: give at least one record")
    random = torch.Generator().manual_seed(seed)
    chosen, parts = _prompt_order(records, config.pairs, random), []
    batches = [chosen[start : start + PROMPTS_PER_BATCH] for start in range(0, len(chosen), PROMPTS_PER_BATCH)]
    for batch in told(batches, len(chosen), "pairs to prefer in", size=len):
        parts.append(_pair_batch(generator, network, reward, batch, config, draw_seed(random)))
    win, lose, cond, rewards, prompts = zip(*parts, strict=True)
    pairs = Pairs(
        torch.cat(win), torch.cat(lose), Condition.cat(list(cond)), torch.cat(rewards),
        [prompt for part in prompts for prompt in part], 0,
    )  # fmt: skip
    pairs.ties = config.pairs - len(pairs)
    if not len(pairs):
        raise ValueError(
            f"all {config.pairs} pairs tie: the reward does not tell these clips apart; use another reward or prompts"
        )
    return pairs


def _pair_batch(generator, network, reward, records, config, seed):
    """(win, lose, cond, rewards, prompts) of one batch, ties left out."""
    rollouts = collect(
        generator, network, reward, records, group_size=2, steps=config.num_steps, guidance_scale=config.guidance_scale,
        seed=seed, decode_iterations=config.decode_iterations, precision=config.precision, sample_batch=config.sample_batch,
        unnormalise=config.unnormalise,
    )  # fmt: skip
    scores = rollouts.rewards.view(-1, 2)
    first = 2 * torch.arange(len(scores)) + (scores[:, 1] > scores[:, 0]).long()
    decided = scores[:, 0] != scores[:, 1]
    win, lose = first[decided], (first ^ 1)[decided]
    prompts = [rollouts.prompts[i] for i in win.tolist()]
    rewards = torch.stack([rollouts.rewards[win], rollouts.rewards[lose]], 1)
    return rollouts.latents[win], rollouts.latents[lose], rollouts.cond.index(win), rewards, prompts


def pair_errors(
    network: FluxAudio, pairs: Pairs, rows: Tensor, t: Tensor, noise: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """Velocity errors (winner (B,), loser (B,)) float32, in one doubled batch, without guidance.

    rows (B,); ONE time t (B,) and ONE noise (B, N, C) per pair, shared by its two clips, so that only the clips differ.
    """
    x0 = torch.cat([pairs.win[rows], pairs.lose[rows]])
    cond, t, noise = pairs.cond.index(rows), torch.cat([t, t]).to(x0.device), torch.cat([noise, noise]).to(x0.device)
    with autocast(precision, x0.device.type):
        velocity = flow.guided(network, flow.interpolate(x0, noise, t), t, Condition.cat([cond, cond]), 1.0)
    return tuple(flow.velocity_error(velocity, flow.velocity_target(x0, noise)).chunk(2))


def batch_rows(pairs: int, batch_size: int, step: int, seed: int) -> Tensor:
    """(min(batch_size, pairs),) int64: the pairs of one step. Every pair is seen once in a random order before any is seen again,
    in another order; a function of (seed, step)."""
    size = min(batch_size, pairs)
    first, last = step * size // pairs, (step * size + size - 1) // pairs  # passes over the pairs that the step lies in
    orders = [torch.randperm(pairs, generator=step_generator(seed, number)) for number in range(first, last + 1)]
    return torch.cat(orders)[step * size - first * pairs :][:size]


def update(network, reference, optimizer, pairs: Pairs, rows: Tensor, config, generator: torch.Generator) -> dict[str, float]:
    """One optimizer step on the pairs `rows` (`batch_rows`).

    A pass takes at most config.micro_batch clips, half as many pairs. t is uniform on [0, 1] (published; TangoFlux: logit-normal).
    """
    t = torch.rand(len(rows), generator=generator)
    noise = torch.randn(len(rows), *pairs.win.shape[1:], generator=generator)

    def backward(part: slice, share: float) -> dict[str, float]:
        err_win, err_lose = pair_errors(network, pairs, rows[part], t[part], noise[part], config.precision)
        with torch.no_grad():
            ref_win, ref_lose = pair_errors(reference, pairs, rows[part], t[part], noise[part], config.precision)
        out = crpo_loss(err_win, ref_win, err_lose, ref_lose, beta=config.beta, sft_weight=config.sft_weight)
        (out.loss * share).backward()
        return {
            "loss": out.loss.item(),
            "accuracy": out.accuracy.item(),
            "margin": out.inside.mean().item(),
            "err_win": err_win.mean().item(),
            "err_win_ref": ref_win.mean().item(),
            "err_lose": err_lose.mean().item(),
            "err_lose_ref": ref_lose.mean().item(),
        }

    metrics = in_parts(backward, len(rows), config.micro_batch // 2)  # a pair is two clips
    return metrics | {"grad_norm": optimizer_step(network, optimizer, config.max_grad_norm)}


def train(
    generator, reward, records: list[dict], config, *, seed: int = 0, checkpoint=None, callback=None,
    pairs: Pairs | None = None,
) -> list[dict]:  # fmt: skip
    """Flow-DPO on generator.network, in place; returns one dict of metrics per step.

    pairs: the first ones, made before by `make_pairs`; None makes them here with the network as it is. With
    config.fresh_every the reference makes new ones after every so many steps, a function of the seed and the round; each step
    then learns from its own round's alone.

    The reference is a frozen copy of the network as it is when this is called (with a checkpoint: call it with the
    same start; the pairs are a function of it and the seed). callback(i, metrics) runs after each step. Every row
    repeats pairs, tied_pairs, reward_win and reward_lose of its data.
    """
    check_flow(generator, "Flow-DPO")
    with learning(generator.network.train(), config, seed=seed) as policy:
        reference = reference_of(policy)
        made: dict[int, Pairs] = {} if pairs is None else {0: pairs}  # of the latest round alone
        optimizer = make_optimizer(policy, config.learning_rate)

        def step(i: int, random: torch.Generator) -> dict[str, float]:
            number = i // config.fresh_every if config.fresh_every else 0
            if number not in made:
                made.clear()
                drawn = draw_seed(step_generator(seed, -number)) if number else seed
                made[number] = make_pairs(generator, reference, reward, records, config, seed=drawn)
            its = made[number]
            win, lose = its.rewards.mean(0).tolist()
            data = {"pairs": float(len(its)), "tied_pairs": float(its.ties), "reward_win": win, "reward_lose": lose}
            rows = batch_rows(len(its), config.batch_size, i - number * config.fresh_every, draw_seed(step_generator(seed, number)))
            metrics = update(policy, reference, optimizer, its, rows, config, random) | data
            if callback is not None:
                callback(i, metrics)
            return metrics

        return fit(step, steps=config.steps, modules={"network": policy, "optimizer": optimizer}, label="DPO", seed=seed,
                   checkpoint=checkpoint, save_every=SAVE_EVERY)
