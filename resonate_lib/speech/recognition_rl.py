"""Reinforcement of a recogniser: GRPO with rules as reward, and minimum word error rate training, on hypotheses it samples.

A round draws utterances, samples a group of hypotheses for each, scores them, and makes `epochs` updates over all of them; groups
that tie teach nothing and are left out. Source: GRPO (arXiv 2402.03300) for recognition as in arXiv 2509.18569; the other
objective is in `mwer`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resonate_lib.online import (
    SAVE_EVERY,
    group_advantages,
    make_optimizer,
    mean_of,
    optimizer_step,
    parts,
    reward_metrics,
    warm_up,
)
from resonate_lib.speech import token_policy
from resonate_lib.speech.engine import Engine
from resonate_lib.speech.errors import hallucinates, word_errors
from resonate_lib.speech.mwer import first_of_equal, mwer_loss
from resonate_lib.speech.recognition import Recogniser, clips_of, fitting
from resonate_lib.training import autocast, fit
from resonate_lib.turns import Timeline, Turns

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")  # attention of the decoder and of the audio tower
LARGEST = ("ratio_deviation",)  # of the metrics of a round's batches the maximum counts, else the mean

RuleReward = Callable[[str, object], tuple[float, dict[str, float]]]  # (hypothesis, utterance) -> score and its parts


@dataclass
class Batch:
    """B utterances of like length and their n = B * group_size hypotheses: what an update computes at once.

    features (B, mels, T), frames (B,); ids, mask, old, ref (n, L): tokens, log-probabilities when sampled and under the reference
    (None: no KL), all at the temperature of the sampling; advantages, errors (n,); texts: B references.
    """

    features: Tensor
    frames: Tensor
    ids: Tensor
    mask: Tensor
    old: Tensor
    texts: list[str]
    advantages: Tensor | None = None
    errors: Tensor | None = None
    ref: Tensor | None = None

    def groups(self, kept: Tensor) -> Batch:
        """The utterances `kept` (B,) bool, with their hypotheses."""
        rows = kept.repeat_interleave(len(self.ids) // len(kept))
        tensors = {name: getattr(self, name)[rows] for name in ("ids", "mask", "old", "advantages", "errors")}
        texts = [text for text, own in zip(self.texts, kept.tolist(), strict=True) if own]
        return Batch(self.features[kept], self.frames[kept], texts=texts, **tensors)


@dataclass
class Round:
    """n hypotheses of a round, siblings adjacent: rewards, group_ids, errors (n,), parts name -> (n,), hypotheses and the
    utterances they are of; numbers: other things to log."""

    batches: list[Batch]
    rewards: Tensor
    parts: dict[str, Tensor]
    group_ids: Tensor
    errors: Tensor
    hypotheses: list[str]
    utterances: list
    numbers: dict[str, float]

    @property
    def groups(self) -> int:
        """How many groups; ids run from 0."""
        return int(self.group_ids.max()) + 1


def rule_reward(spec: str) -> RuleReward:
    """The rules that a line of configuration names, "wer+0.5*keyword-0.5*hallucination", as a reward of transcripts; keywords are
    the utterance's own, weighed by `data.speech.keyword_weights`. ValueError for a rule that does not exist."""
    from resonate_lib.data.speech import keyword_weights
    from resonate_lib.rewards.rules import parse_weights, transcript_reward

    weights, weighed = parse_weights(spec), keyword_weights()

    def reward(hypothesis: str, utterance) -> tuple[float, dict[str, float]]:
        return transcript_reward(hypothesis, utterance.text, weights=weights, keywords=utterance.keywords, keyword_weights=weighed)

    return reward


def _sampled(recogniser: Recogniser, inputs, clips, config, generator, engine) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """ids and mask (n, L), log-probabilities (None: to be computed), and how far an engine's are from the policy's (nan)."""
    settings = {name: getattr(config, name) for name in ("group_size", "max_new_tokens", "temperature", "top_p")}
    if engine is None:
        got = token_policy.sample(recogniser.model, inputs, generator=generator, **settings)
        return got.ids, got.mask, got.log_probs if config.precision == "float32" else None, float("nan")
    replies = [reply for group in engine.sample(clips, generator=generator, **settings) for reply in group]
    ids, mask = recogniser.encode([reply.text for reply in replies])
    ended = torch.tensor([reply.ended for reply in replies], device=mask.device)
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(-1, keepdim=True) - 1
    mask &= ended[:, None] | ~last  # the end token of one that was cut off was never drawn
    plain = token_policy.token_log_probs(recogniser.model, inputs, ids, mask)
    theirs = torch.tensor([reply.log_prob for reply in replies], device=mask.device)  # engines send those at temperature 1
    gap = ((plain.sum(-1) - theirs).abs() / mask.sum(-1).clamp_min(1)).nanmean().item()
    return ids, mask, plain if config.temperature == 1 else None, gap


@torch.no_grad()
def collect(
    recogniser: Recogniser, corpus, reward: RuleReward, positions: Sequence[int], config, generator: torch.Generator,
    *, turns: Turns, engine: Engine | None = None,
) -> Round:  # fmt: skip
    """Sample config.group_size hypotheses for each utterance at these positions and score them; advantages are computed.

    Shortest first, at most config.micro_batch utterances at a time: all are heard in the encoder's turn, then sampled in the
    decoder's (`taking_turns`). engine: what samples in the policy's stead.
    """
    positions = sorted(positions, key=lambda place: (len(corpus.audio[place]), place))
    batches, said, cut, entropies, gaps, every = [], [], [], [], [], []
    with turns.take("encoder"):
        for part in parts(len(positions), config.micro_batch):
            features, frames = recogniser.features(clips_of(corpus, positions[part]))
            with autocast(config.precision, features.device.type):
                every.append((part, features, frames, recogniser.listen(features, frames)))
    with turns.take("decoder"):
        for part, features, frames, heard in every:
            clips = clips_of(corpus, positions[part])
            with autocast(config.precision, features.device.type):
                inputs = recogniser.prompts(heard)
                ids, mask, old, gap = _sampled(recogniser, inputs, clips, config, generator, engine)
                if old is None:
                    old = token_policy.token_log_probs(recogniser.model, inputs, ids, mask, temperature=config.temperature)
            batches.append(Batch(features, frames, ids, mask, old, [corpus.utterances[place].text for place in positions[part]]))
            said += recogniser.decode(ids, mask)
            ends = torch.isin(ids, torch.tensor(recogniser.end, device=ids.device)) & mask
            cut += (~ends.any(-1)).tolist()
            entropies += token_policy.sequence_mean(-old, mask).tolist()
            gaps.append(gap)
    utterances = [corpus.utterances[place] for place in positions for _ in range(config.group_size)]
    made = _scored(batches, said, utterances, reward, config)
    made.numbers |= {"cut_off": sum(cut) / len(cut), "entropy": sum(entropies) / len(entropies)}  # nats a token, of what was drawn
    made.numbers |= {"engine_gap": mean_of([{"gap": gap} for gap in gaps])["gap"]} if engine else {}
    return made


def _scored(batches: list[Batch], said: list[str], utterances: list, reward: RuleReward, config) -> Round:
    """The round of these hypotheses: rewards, errors and advantages, in the round and in its batches."""
    scores, named = zip(*(reward(*pair) for pair in zip(said, utterances, strict=True)), strict=True)
    tensors = {name: torch.tensor([float(row[name]) for row in named]) for name in named[0]}
    found = [word_errors(text, one.text) for text, one in zip(said, utterances, strict=True)]
    invented = sum(hallucinates(text, one.text) for text, one in zip(said, utterances, strict=True))
    errors = torch.tensor([float(row["errors"]) for row in found])
    numbers = {"wer": errors.sum().item() / max(sum(row["words"] for row in found), 1), "hallucinated": invented / len(said)}
    group_ids = torch.arange(len(said) // config.group_size).repeat_interleave(config.group_size)
    made = Round(batches, torch.tensor(scores).float(), tensors, group_ids, errors, said, utterances, numbers)
    advantages, first = group_advantages(made.rewards, group_ids, global_std=config.global_std), 0
    for batch in batches:
        own = slice(first, first + len(batch.ids))
        batch.advantages, batch.errors = (values[own].to(batch.ids.device) for values in (advantages, errors))
        first = own.stop
    return made


def teaching(batch: Batch, config) -> Batch | None:
    """The batch without groups that tie: no advantage, or for mwer equal numbers of errors. None where none is left."""
    values = batch.errors if config.objective == "mwer" else batch.advantages
    values = values.view(len(batch.frames), -1)
    kept = (values != values[:, :1]).any(-1)
    return batch.groups(kept) if bool(kept.any()) else None


def batch_loss(recogniser: Recogniser, batch: Batch, config) -> tuple[Tensor, dict[str, float]]:
    """The objective's loss on one batch, and what to report; gradients reach the audio tower too."""
    inputs = recogniser.prompts(recogniser.listen(batch.features, batch.frames))
    new = token_policy.token_log_probs(recogniser.model, inputs, batch.ids, batch.mask, temperature=config.temperature)
    if config.objective == "grpo":
        return token_policy.grpo_loss(
            new, batch.old, batch.ref, batch.mask, batch.advantages, clip_range=config.clip_range, beta=config.beta
        )
    group_ids = torch.arange(len(batch.frames), device=new.device).repeat_interleave(config.group_size)
    distinct = first_of_equal(batch.ids, batch.mask, group_ids)
    loss = expected = mwer_loss(new.sum(-1), batch.errors, group_ids, distinct)
    off = (torch.exp(new - batch.old) - 1).abs() * batch.mask
    metrics = {"expected_errors": expected.item(), "ratio_deviation": off.max().item()}
    if config.ce_weight:
        ids, mask = recogniser.encode(batch.texts)
        ce = -token_policy.token_log_probs(recogniser.model, inputs, ids, mask).sum(-1).mean()
        loss, metrics["ce"] = loss + config.ce_weight * ce, ce.item()
    return loss, {"loss": loss.item(), **metrics}


def update(recogniser: Recogniser, module, optimizer, made: Round, config, reference, turns: Turns) -> dict[str, float]:
    """config.epochs updates over a round's hypotheses, gradients of its batches added up. Returns means over updates,
    `first_ratio_deviation` (of the first update's ratios from 1: in float32 below 1e-4) and skipped = 1 where every group ties."""
    batches = [batch for batch in (teaching(batch, config) for batch in made.batches) if batch is not None]
    groups = sum(len(batch.frames) for batch in batches)
    if not groups:
        return {"trained": 0.0, "skipped": 1.0}
    device = batches[0].ids.device.type
    if config.objective == "grpo" and config.beta > 0:
        with torch.no_grad(), reference(turns), autocast(config.precision, device):
            for batch in batches:
                inputs = recogniser.prompts(recogniser.listen(batch.features, batch.frames))
                batch.ref = token_policy.token_log_probs(recogniser.model, inputs, batch.ids, batch.mask,
                                                         temperature=config.temperature)
    rows = []
    with turns.take("encoder", "decoder", "optimizer"):
        for _ in range(config.epochs):
            pieces = []
            for batch in batches:
                with autocast(config.precision, device):
                    loss, metrics = batch_loss(recogniser, batch, config)
                (loss * len(batch.frames) / groups).backward()
                pieces.append({name: value * len(batch.frames) / groups for name, value in metrics.items() if name not in LARGEST}
                              | {name: metrics[name] for name in LARGEST})  # fmt: skip
            turns.count()  # with the gradients
            row = {name: (max if name in LARGEST else sum)(piece[name] for piece in pieces) for name in pieces[0]}
            rows.append(row | {"grad_norm": optimizer_step(module, optimizer, config.max_grad_norm)})
    first = rows[0]["ratio_deviation"]
    return mean_of(rows) | {"first_ratio_deviation": first, "trained": float(groups * config.group_size), "skipped": 0.0}


def taking_turns(recogniser: Recogniser, timeline: Timeline | None = None, **others) -> Turns:
    """Encoder and decoder of the recogniser, and `others` (optimizer, reference), as parts that take turns on its device. The
    embedding of tokens and the output layer are the decoder's, the projector is the encoder's."""
    model = recogniser.model
    core = model.model
    own = {"encoder": [core.audio_tower, core.multi_modal_projector], "decoder": [core.language_model, model.lm_head]}
    return Turns(own | others, model.device, timeline)


@contextlib.contextmanager
def learning(recogniser: Recogniser, config, *, seed: int) -> Iterator[tuple]:
    """Within the block (what learns, reference, parts): a module or adapter with parameters and state_dict; a context, called with
    the Turns, in which the recogniser is what it was at the start; and what takes turns beside recogniser and optimizer. "lora":
    adapters on the attention's projections, merged at the end."""
    start = recogniser.model
    if config.trained == "lora":
        from resonate_lib.models import lora  # peft takes seconds to import

        adapted = lora.attach(start, config.lora_rank, config.lora_alpha, LORA_TARGETS, seed=seed)

        @contextlib.contextmanager
        def without(turns: Turns):
            with turns.take("encoder", "decoder"), adapted.model.disable_adapter():
                yield

        try:
            yield adapted, without, {}
        finally:
            recogniser.model = lora.merge(adapted)
        return
    if config.objective != "grpo" or config.beta == 0:  # nothing asks for the start
        yield start, None, {}
        return
    frozen = copy.deepcopy(start).requires_grad_(False)

    @contextlib.contextmanager
    def reference(turns: Turns):
        with turns.take("reference"):
            recogniser.model = frozen
            try:
                yield
            finally:
                recogniser.model = start

    yield start, reference, {"reference": frozen}


def train(
    recogniser: Recogniser, corpus, reward: RuleReward, config, *, positions: Sequence[int] | None = None, seed: int = 0,
    checkpoint=None, callback=None, timeline: Timeline | None = None,
) -> list[dict]:  # fmt: skip
    """Reinforcement of the recogniser, in place, by a `RecognitionConfig`; returns one dict of metrics per round.

    positions: the utterances of the corpus to draw from (None: all); those longer than the recogniser hears are left out and
    counted. The KL's reference is the recogniser as it is when this is called (with a checkpoint: call it with the same start).
    callback(i, round, metrics) runs after each round. Encoder, decoder, optimizer and reference take turns on the recogniser's
    device; timeline gets a row for each load and release (`Turns`) and is part of the state. The same seed gives the same bytes on
    a CPU; on a GPU some sums are added up in no fixed order. Metrics: `online.reward_metrics`, `collect`, `update`. ValueError for
    too few utterances, before anything is sampled.
    """
    kept, left_out = fitting(corpus, recogniser.seconds)
    pool = kept if positions is None else sorted(set(positions) & set(kept))
    if left_out:
        print(f"{left_out} utterances are longer than {recogniser.seconds:g} s and are left out", flush=True)
    if len(pool) < config.utterances_per_step:
        raise ValueError(f"utterances_per_step={config.utterances_per_step}: only {len(pool)} utterances to draw from; use fewer")
    engine = Engine(config.rollout_source) if config.rollout_source else None
    with learning(recogniser, config, seed=seed) as (module, reference, held):
        optimizer = make_optimizer(module, config.learning_rate)
        turns = taking_turns(recogniser, timeline, optimizer=optimizer, **held)

        def step(i: int, random: torch.Generator) -> dict[str, float]:
            warm_up(optimizer, i, config.learning_rate, config.warmup_steps)
            drawn = torch.randperm(len(pool), generator=random)[: config.utterances_per_step].tolist()
            made = collect(recogniser, corpus, reward, [pool[k] for k in drawn], config, random, turns=turns, engine=engine)
            metrics = reward_metrics(made) | made.numbers | update(recogniser, module, optimizer, made, config, reference, turns)
            if callback is not None:
                callback(i, made, metrics)
            return metrics

        modules = {"policy": module, "optimizer": optimizer} | ({} if timeline is None else {"timeline": timeline})
        history = fit(step, steps=config.steps, modules=modules, label=config.objective.upper(), seed=seed, checkpoint=checkpoint,
                      save_every=SAVE_EVERY)  # fmt: skip
        turns.end("encoder", "decoder")  # the recogniser stays where it was
        return history
