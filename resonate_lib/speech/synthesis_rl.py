"""Reinforcing the speaker: GRPO by what a recogniser hears, DiffRO by the gradient of a reward on tokens, or both, with or without
sample filtering.

Sources: GRPO (arXiv 2402.03300), DiffRO (arXiv 2507.05911), both together with filtering (arXiv 2509.18569). Differs from those:
the multi-task parts (pitch, rate, quality) are read from the tokens in GRPO too, where text is what the recogniser hears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from resonate_lib.diffro import gumbel_softmax, keep_groups, temperature_at
from resonate_lib.online import (
    draw_seed,
    frozen_copy,
    group_advantages,
    in_parts,
    make_optimizer,
    mean_of,
    optimizer_step,
    parts,
    warm_up,
)
from resonate_lib.rewards.base import check_result
from resonate_lib.speech import token_policy
from resonate_lib.speech.lines import Line
from resonate_lib.speech.synthesis import FIRST_TOKEN, Speaker
from resonate_lib.speech.token_reward import PARTS, TokenReader, mixed
from resonate_lib.training import autocast, fit
from resonate_lib.turns import Timeline, Turns

SAVE_EVERY = 5  # rounds


@dataclass
class Spoken:
    """A round of n = lines * group_size sequences, siblings adjacent.

    sampled: the sequences; tokens: their rows of speech tokens; failed (n,) bool: `Speaker.tokens`; lines (n); rewards (n,);
    parts name -> (n,); keep (n,) bool, after filtering; dropped: how many left for which reason; advantages (n,) float64, 0 for
    what was dropped; clips: what the recogniser heard, None where none was asked.
    """

    sampled: token_policy.Sampled
    tokens: list[Tensor]
    failed: Tensor
    lines: list[Line]
    rewards: Tensor
    parts: dict[str, Tensor]
    keep: Tensor
    dropped: dict[str, int]
    advantages: Tensor
    clips: list[Tensor] | None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, (B,)."""
        return torch.tensor([len(row) for row in self.tokens])


def weights_of(config) -> dict[str, float]:
    """The multi-task weights of a configuration; pitch and rate share one."""
    return {"text": config.text_weight, "pitch": config.attribute_weight, "rate": config.attribute_weight,
            "quality": config.quality_weight}  # fmt: skip


@torch.no_grad()
def judged(speaker: Speaker, reader: TokenReader, reward, tokens: list[Tensor], lines: list[Line], config):
    """Rewards (n,), parts and clips of rows of tokens: the reader's parts and, for objectives with GRPO, in place of its text what
    `reward` hears in the decoded clips. The reader must have the turn.

    Rewards of nothing: a recogniser that hears nothing gives its score of "", a reader without a token reads WORST.
    """
    parts = {name: part.cpu() for name, part in reader.parts(*reader.one_hot(tokens), lines).items()}
    clips = None
    if config.objective != "diffro":
        clips = speaker.tokenizer.decode(tokens, iterations=config.decode_iterations)
        texts = [line.text for line in lines]
        heard = check_result(reward(clips, speaker.sample_rate, texts, [line.as_dict() for line in lines]), len(lines))
        parts = {**parts, "read": parts["text"], "text": heard.scores}
    wanted = mixed({name: parts[name] for name in PARTS}, weights_of(config))
    return wanted.float(), parts, clips


def roll_out(
    speaker: Speaker, reader: TokenReader, reward, lines: Sequence[Line], config, random: torch.Generator, turns: Turns
) -> Spoken:
    """Sample config.group_size sequences for each line in the policy's turn, score them in the reader's and, with config.filtering,
    decide what to learn from. A group's spread is that of the text part: what the reader thinks of quality differs from sample to
    sample, and would hide that all say the same."""
    with turns.take("policy"), autocast(config.precision, speaker.model.device.type):
        sampled = speaker.sample(lines, group_size=config.group_size, temperature=config.temperature, max_tokens=config.max_tokens,
                                 generator=random)
    tokens, failed = speaker.tokens(sampled)
    every = [line for line in lines for _ in range(config.group_size)]
    with turns.take("reader"):
        rewards, parts, clips = judged(speaker, reader, reward, tokens, every, config)
    keep, dropped = torch.ones(len(every), dtype=torch.bool), {"failed": 0, "length": 0, "spread": 0}
    if config.filtering:
        lengths = torch.tensor([len(row) for row in tokens])
        keep, dropped = keep_groups(parts["text"], sampled.group_ids, lengths=lengths, failed=failed | ~rewards.isfinite(),
                                    min_spread=config.min_spread, length_deviations=config.length_deviations)
    advantages = torch.zeros(len(every), dtype=torch.float64)
    if keep.any():
        advantages[keep] = group_advantages(rewards[keep], sampled.group_ids[keep], global_std=False)
    return Spoken(sampled, tokens, failed, every, rewards, parts, keep, dropped, advantages, clips)


def diffro_loss(
    logits: Tensor, reference: Tensor | None, mask: Tensor, reader: TokenReader, lines: Sequence[Line], *,
    weights: Mapping[str, float], temperature: float, beta: float, generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """DiffRO's loss of n sequences: minus the mean reward of Gumbel-Softmax draws, plus beta times the KL to the reference.

    logits, reference (n, L, vocabulary): by teacher forcing on the policy's own samples; mask (n, L): which places hold speech
    tokens (not the end). At each of them a speech token is drawn anew, straight through, and the reader scores the row. The KL is
    exact, over the whole vocabulary and all places of the mask, in nats a token; with it the end token, which the reward does not
    see, keeps its place. Returns (loss 0-dim, metrics).
    """
    drawn = gumbel_softmax(logits[..., FIRST_TOKEN:].float(), temperature=temperature, generator=generator) * mask[..., None]
    parts = reader.parts(drawn, mask, lines)
    score = mixed(parts, weights)
    kl = torch.zeros(len(logits), device=logits.device)
    if reference is not None:
        new, old = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        kl = token_policy.sequence_mean((new.exp() * (new - old)).sum(-1), mask)
    loss = -score.mean() + beta * kl.mean()
    means = {f"soft_{name}": part.mean().item() for name, part in parts.items()}
    return loss, {"diffro_loss": loss.item(), "diffro_kl": kl.mean().item(), **means}


@dataclass
class Kept:
    """The n sequences of a round that are learnt from: lines (n); ids, mask, speech (n, L): tokens, the real ones, those that are
    speech; advantages (n,); old (n, L): log-probabilities of the policy that sampled; known: the reference's logits (n, L,
    vocabulary), None without one."""

    lines: list[Line]
    ids: Tensor
    mask: Tensor
    speech: Tensor
    advantages: Tensor
    old: Tensor
    known: Tensor | None = None


def kept_of(spoken: Spoken) -> Kept:
    """The sequences that filtering left."""
    rows = spoken.keep.nonzero().flatten()
    ids, mask, old = (table[rows] for table in (spoken.sampled.ids, spoken.sampled.mask, spoken.sampled.log_probs))
    lines = [spoken.lines[k] for k in rows.tolist()]
    return Kept(lines, ids, mask, mask & (ids >= FIRST_TOKEN), spoken.advantages[rows], old)


def update(
    speaker: Speaker, reference, optimizer, reader: TokenReader, spoken: Spoken, config, temperature: float,
    random: torch.Generator, turns: Turns,
) -> dict[str, float]:  # fmt: skip
    """config.epochs optimizer steps on the kept sequences of a round, config.micro_batch of them computed at once; returns means
    over the steps, `first_ratio_deviation`, and skipped = 1 where nothing was kept, or nothing that DiffRO alone could learn from:
    no token of speech. The reader, whose gradient DiffRO needs, has its turn together with policy and optimizer."""
    kept = kept_of(spoken)
    if not len(kept.lines) or (config.objective == "diffro" and not kept.speech.any()):
        return {"first_ratio_deviation": 0.0, "skipped": 1.0}
    slices = parts(len(kept.lines), config.micro_batch)
    if reference is not None:
        with torch.no_grad(), turns.take("reference"):
            kept.known = torch.cat([_logits(reference, speaker, kept, part, config) for part in slices])
    together = ("policy", "optimizer") if config.objective == "grpo" else ("policy", "optimizer", "reader")
    with turns.take(*together):
        if config.precision != "float32" and config.objective != "diffro":  # scored as it is trained: the first ratio is 1
            with torch.no_grad():
                logits = torch.cat([_logits(speaker.model, speaker, kept, part, config) for part in slices])
                kept.old = _chosen(logits, kept.ids, kept.mask)
        found = [_step(speaker, optimizer, reader, kept, config, temperature, random, turns) for _ in range(config.epochs)]
    first = found[0].get("ratio_deviation", 0.0)
    return {**mean_of(found), "first_ratio_deviation": first, "skipped": 0.0}


def _logits(model, speaker: Speaker, kept: Kept, part: slice, config) -> Tensor:
    """Logits (b, L, vocabulary) of these sequences by teacher forcing, in the configured precision, over the temperature that they
    were sampled at: what is trained is the policy that spoke."""
    device = kept.ids.device
    with autocast(config.precision, device.type):
        logits = token_policy.token_logits(model, speaker.prompts(kept.lines[part], device=device), kept.ids[part])
    return logits / config.temperature


def _step(
    speaker: Speaker, optimizer, reader: TokenReader, kept: Kept, config, temperature: float, random: torch.Generator, turns: Turns
) -> dict[str, float]:
    """One optimizer step; the gradients of the parts, each a mean, are added up by their shares of the sequences."""

    def backward(part: slice, share: float) -> dict[str, float]:
        loss, metrics = part_loss(speaker, reader, kept, part, config, temperature, random)
        (loss * share).backward()
        return metrics

    largest = () if config.objective == "diffro" else ("ratio_deviation",)
    metrics = in_parts(backward, len(kept.lines), config.micro_batch, largest=largest)
    turns.count()  # with the gradients
    return metrics | {"grad_norm": optimizer_step(speaker.model, optimizer, config.max_grad_norm)}


def part_loss(
    speaker: Speaker, reader: TokenReader, kept: Kept, part: slice, config, temperature: float, random: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The objective's loss, a mean over the sequences of the slice, and what to report. GRPO's loss has a KL of its own, so that
    DiffRO's counts only where DiffRO is alone."""
    ids, mask, lines = kept.ids[part], kept.mask[part], kept.lines[part]
    known = None if kept.known is None else kept.known[part]
    logits = _logits(speaker.model, speaker, kept, part, config)
    loss, metrics = logits.new_zeros(()), {}
    if config.objective != "diffro":
        new, ref = (_chosen(table, ids, mask) if table is not None else None for table in (logits, known))
        loss, metrics = token_policy.grpo_loss(new, kept.old[part], ref, mask, kept.advantages[part],
                                               clip_range=config.clip_range, beta=config.beta)
    if config.objective != "grpo":
        alone = config.objective == "diffro"
        own, told = diffro_loss(logits, known, kept.speech[part], reader, lines, weights=weights_of(config),
                                temperature=temperature, beta=config.beta if alone else 0.0, generator=random)
        loss, metrics = loss + (1.0 if alone else config.diffro_weight) * own, metrics | told
    with torch.no_grad():
        entropy = token_policy.sequence_entropy(logits, mask).mean().item()
    return loss, metrics | {"entropy": entropy}


def _chosen(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (n, L) of the ids, 0 outside the mask."""
    return -F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape) * mask


def round_metrics(spoken: Spoken) -> dict[str, float]:
    """What a round looked like: reward_mean and reward_std over all samples; the parts' means; zero_groups, the share of groups
    whose rewards all tie; tokens and tokens_std, lengths; failed, the share of failed decodes; kept and dropped_<reason>."""
    count, groups = len(spoken.rewards), spoken.sampled.group_ids
    tied = [float((spoken.rewards[groups == g] == spoken.rewards[groups == g][0]).all()) for g in groups.unique()]
    lengths = spoken.lengths.float()
    return {
        "reward_mean": spoken.rewards.mean().item(),
        "reward_std": spoken.rewards.std(correction=0).item(),
        **{name: part.mean().item() for name, part in spoken.parts.items()},
        "zero_groups": sum(tied) / len(tied),
        "tokens": lengths.mean().item(),
        "tokens_std": lengths.std(correction=0).item(),
        "failed": spoken.failed.float().mean().item(),
        "kept": spoken.keep.float().mean().item(),
        **{f"dropped_{reason}": number / count for reason, number in spoken.dropped.items()},
    }


class _Misled:
    """A reader that is asked for the lines `shift` rows further on than those that were said."""

    def __init__(self, reader: TokenReader, shift: int):
        self.reader, self.shift = reader, shift

    def parts(self, weights: Tensor, mask: Tensor, lines: Sequence[Line]) -> dict[str, Tensor]:
        shift = self.shift % len(lines)
        return self.reader.parts(weights, mask, [*lines[shift:], *lines[:shift]])


def _shuffled(kept: Kept, groups: Tensor, random: torch.Generator) -> Kept:
    """The same sequences with their advantages dealt out anew within each group, groups (n,)."""
    advantages = kept.advantages.clone()
    for group in groups.unique():
        own = (groups == group).nonzero().flatten()
        advantages[own] = kept.advantages[own[torch.randperm(len(own), generator=random)]]
    return replace(kept, advantages=advantages)


def round_gradients(
    speaker: Speaker, reader: TokenReader, reward, lines: Sequence[Line], config, *, seed: int = 0, shuffles: int = 0
) -> Tensor:
    """The gradient of the objective's loss, without its KL, in one round on these lines, and, of the same samples, `shuffles`
    gradients of a lesson without sense: (1 + shuffles, weights), on the CPU; the speaker stays as it is.

    Two rounds whose gradients have no cosine have nothing to tell each other: what the one learns the other does not confirm. In a
    shuffled one advantages are dealt out anew within their groups, and the reader is asked for the text of another line (of the
    same micro-batch; with one line in it, of the same): its cosines are what comes of the model alone. ValueError where nothing
    was kept.
    """
    random, turns, config = torch.Generator().manual_seed(seed), taking_turns(speaker, reader), replace(config, beta=0.0)
    spoken = roll_out(speaker, reader, reward, lines, config, random, turns)
    kept, groups, found = kept_of(spoken), spoken.sampled.group_ids[spoken.keep], []
    if not len(kept.lines):
        raise ValueError(f"of {len(lines)} lines x {config.group_size} samples nothing was kept: no gradient to look at")
    with turns.take("policy", "reader"):
        for number in range(1 + shuffles):
            asked = _Misled(reader, number * config.group_size) if number else reader
            lesson = _shuffled(kept, groups, random) if number else kept
            speaker.model.zero_grad(set_to_none=True)
            for part in parts(len(kept.lines), config.micro_batch):
                loss, _ = part_loss(speaker, asked, lesson, part, config, config.gumbel_start, random)
                (loss * (part.stop - part.start) / len(kept.lines)).backward()
            found.append(torch.cat([p.grad.flatten().cpu() for p in speaker.model.parameters() if p.grad is not None]))
        speaker.model.zero_grad(set_to_none=True)
    turns.end("policy", "reader")
    return torch.stack(found)


def taking_turns(speaker: Speaker, reader: TokenReader, timeline: Timeline | None = None, **others) -> Turns:
    """Policy and reader, and `others` (optimizer, reference), as parts that take turns on the model's device."""
    return Turns({"policy": speaker.model, "reader": reader, **others}, speaker.model.device, timeline)


def train(
    speaker: Speaker, reader: TokenReader, reward, lines: Sequence[Line], config, *, seed: int = 0, checkpoint=None,
    callback: Callable[[int, dict, Spoken], None] | None = None, timeline: Timeline | None = None,
) -> list[dict]:  # fmt: skip
    """Reinforce speaker.model, in place, by config.objective: "grpo", "diffro" or "both"; returns one dict of metrics a round.

    reward: a Reward that hears the decoded clips, given as a list of (T_i,) (`recognisers.SpeechReward`; not asked by "diffro").
    lines: config.lines_per_step different ones a round. The reference of the KL is the model as it is when this is called.
    callback(round, metrics, spoken) runs after each. Policy, optimizer, reader and reference take turns on the model's device;
    timeline gets a row for each load and release (`Turns`) and is part of the state. The same seed gives the same bytes on a CPU;
    on a GPU some gradients (of CTC, of sums) are added up in no fixed order. Metrics: `round_metrics`, `update`, temperature.
    ValueError for a reader of other tokens or fewer lines than a round takes.
    """
    if reader.shape.codes != speaker.codes:
        raise ValueError(f"a reader of {reader.shape.codes} codes for a speaker of {speaker.codes}: use the one trained with it")
    if len(lines) < config.lines_per_step:
        raise ValueError(f"lines_per_step={config.lines_per_step}, but only {len(lines)} lines: give more or ask for fewer")
    model = speaker.model
    reference = frozen_copy(model) if config.beta > 0 else None
    optimizer = make_optimizer(model, config.learning_rate)
    turns = taking_turns(speaker, reader, timeline, optimizer=optimizer, **({} if reference is None else {"reference": reference}))

    def step(i: int, random: torch.Generator) -> dict[str, float]:
        warm_up(optimizer, i, config.learning_rate, config.warmup_steps)
        chosen = [lines[k] for k in torch.randperm(len(lines), generator=random)[: config.lines_per_step].tolist()]
        spoken = roll_out(speaker, reader, reward, chosen, config, random, turns)
        temperature = temperature_at(i, config.steps, config.gumbel_start, config.gumbel_end)
        own = torch.Generator().manual_seed(draw_seed(random))
        metrics = round_metrics(spoken) | update(speaker, reference, optimizer, reader, spoken, config, temperature, own, turns)
        metrics["temperature"] = temperature
        if callback is not None:
            callback(i, metrics, spoken)
        return metrics

    model.eval()  # without dropout, so that the first ratio is 1
    modules = {"model": model, "optimizer": optimizer} | ({} if timeline is None else {"timeline": timeline})
    history = fit(step, steps=config.steps, modules=modules, label=config.objective, seed=seed, checkpoint=checkpoint,
                  save_every=SAVE_EVERY)
    turns.end("policy", "reader")  # both stay where they were
    return history
