"""Language models as policies: sampling groups of token sequences, their log-probabilities, and GRPO on tokens.

For any transformers causal LM whose logits are its output embedding of the last hidden state (Qwen2, Llama, Qwen2-Audio ...).
A prompt is computed once for all sequences of its group, in sampling and in training: they go on from copies of its cache,
through which gradients flow. Source: GRPO (arXiv 2402.03300), with one clip range and the KL to a frozen reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Sampled:
    """n sequences, siblings adjacent, filled up on the right.

    ids (n, L) int64; mask (n, L) bool, true up to and with the end token; log_probs (n, L) float32 under the whole vocabulary at
    the temperature they were drawn at (greedy ones: at 1), 0 outside the mask; group_ids (n,): the prompt of each.
    """

    ids: Tensor
    mask: Tensor
    log_probs: Tensor
    group_ids: Tensor


def end_tokens(model) -> list[int]:
    """The ids that end a sequence, by the model's generation or text configuration. ValueError where neither names one."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    if ends is None:
        raise ValueError("the model's configuration names no eos_token_id: set it, or a sequence never ends")
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def prefill(model, inputs: Mapping[str, Tensor], group_size: int):
    """The prompts' cache, logits (n, vocabulary) of the first token and attention mask (n, P), each prompt group_size times.

    inputs: what the model's forward takes: input_ids or inputs_embeds, attention_mask (B, P), features; filled up on the left.
    """
    mask = inputs["attention_mask"]
    if not bool(mask[:, -1].all()):
        raise ValueError("a prompt ends in padding: fill prompts up on the left (padding_side='left')")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = model.base_model(**inputs, position_ids=positions, use_cache=True)
    cache, logits = out.past_key_values, model.get_output_embeddings()(out.last_hidden_state[:, -1])
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)
    return cache, logits.repeat_interleave(group_size, 0), mask.repeat_interleave(group_size, 0)


def continued(model, cache, mask: Tensor, ids: Tensor) -> Tensor:
    """Logits (n, L, vocabulary) after each of the tokens ids (n, L) that follow what `cache` holds, which grows by them.

    mask (n, P + what was continued so far): the real ones of the tokens in the cache.
    """
    positions = mask.sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)
    seen = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
    out = model.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return model.get_output_embeddings()(out.last_hidden_state)


def draw(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Tokens (m,) from logits (m, vocabulary) by uniform numbers (m,) in [0, 1): the inverse of the cumulative distribution of
    softmax(logits / temperature), of which only the likeliest tokens that hold top_p together are kept. temperature 0: the
    likeliest token."""
    if temperature == 0:
        return logits.argmax(-1)
    chance = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = chance.sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        chance = torch.zeros_like(chance).scatter(-1, order, ordered * kept)
    edges = chance.cumsum(-1)
    return (edges <= uniform.to(edges)[:, None] * edges[:, -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


@torch.no_grad()
def sample(
    model, inputs: Mapping[str, Tensor], *, group_size: int, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Sampled:  # fmt: skip
    """group_size sequences for each of B prompts, n = B * group_size, with a cache of keys and values.

    inputs: as for `prefill`. generator: on the CPU; one number for every sequence and position is drawn from it and from nothing
    else, also for sequences that have ended (None only with temperature 0, which is greedy). Sequences that ended are taken out of
    the batch, so that a single long one costs little. With top_p below 1 tokens are drawn from a part of the vocabulary and yet
    scored under all of it: their log-probabilities are then not those they were drawn with. ValueError for values out of range.
    """
    if group_size < 1 or max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"group_size={group_size}, max_new_tokens={max_new_tokens}, temperature={temperature}, top_p={top_p}: the first two "
            "are 1 or more, temperature 0 or more, top_p above 0 and at most 1"
        )
    if temperature > 0 and generator is None:
        raise ValueError(f"temperature={temperature} without a generator: pass one, or temperature=0 for the likeliest tokens")
    cache, logits, mask = prefill(model, inputs, group_size)
    count, device = len(logits), logits.device
    ends = torch.tensor(end_tokens(model), device=device)
    ids = torch.full((count, max_new_tokens), int(ends[0]), device=device)
    spoken = torch.zeros(count, max_new_tokens, dtype=torch.bool, device=device)
    log_probs, alive = torch.zeros(count, max_new_tokens, device=device), torch.arange(count, device=device)
    for place in range(max_new_tokens):
        numbers = torch.rand(count, generator=generator, dtype=torch.float64) if temperature > 0 else torch.zeros(count)
        token = draw(logits, numbers.to(device)[alive], temperature=temperature, top_p=top_p)
        ids[alive, place], spoken[alive, place] = token, True
        log_probs[alive, place] = -F.cross_entropy(logits.float() / (temperature or 1.0), token, reduction="none")
        going = (~torch.isin(token, ends)).nonzero().flatten()
        if place + 1 == max_new_tokens or not len(going):
            break
        if len(going) < len(alive):
            cache.batch_select_indices(going)
            alive, mask, token = alive[going], mask[going], token[going]
        logits = continued(model, cache, mask, token[:, None])[:, 0]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    last = place + 1
    group_ids = torch.arange(count // group_size).repeat_interleave(group_size)
    return Sampled(ids[:, :last], spoken[:, :last], log_probs[:, :last], group_ids)


def token_logits(model, inputs: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (n, L, vocabulary) that predict each of ids (n, L) by teacher forcing; n is a multiple of the prompts, siblings
    adjacent."""
    prompts = len(inputs["attention_mask"])
    if len(ids) % prompts or not ids.shape[1]:
        raise ValueError(f"{len(ids)} sequences of {ids.shape[1]} tokens for {prompts} prompts: give each equally many, not empty")
    cache, first, mask = prefill(model, inputs, len(ids) // prompts)
    if ids.shape[1] == 1:
        return first[:, None]
    return torch.cat([first[:, None], continued(model, cache, mask, ids[:, :-1])], dim=1)


def token_log_probs(model, inputs: Mapping[str, Tensor], ids: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log p(token | prompt, tokens before) (n, L) in nats of softmax(logits / temperature), 0 outside mask (n, L); gradients flow.

    Equal to what `sample` stores at this temperature, up to rounding: in float32 the first ratio of an update lies within 1e-4 of
    1. The policy that is trained is the tempered one: samples drawn at another temperature than they are scored at would bias it.
    """
    logits = token_logits(model, inputs, ids).float() / temperature
    return -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape) * mask


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (n, L) over each sequence's own tokens, (n,); 0 for a sequence without any."""
    return (values * mask).sum(-1) / mask.sum(-1).clamp_min(1)


def sequence_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy (n,) in nats of the distributions that a sequence's tokens were drawn from; logits (n, L, vocabulary)."""
    log_p = logits.float().log_softmax(-1)
    return sequence_mean(-(log_p.exp() * log_p).sum(-1), mask)


def kl_tokens(new: Tensor, ref: Tensor) -> Tensor:
    """Estimate of KL(new || ref) at sampled tokens, (n, L) like both log-probabilities: exp(ref - new) - (ref - new) - 1.

    Never negative, and right on average over tokens that `new` drew ("k3": Schulman 2020; GRPO, equation 4).
    """
    return torch.expm1(ref - new) - (ref - new)


def grpo_loss(
    new: Tensor, old: Tensor, ref: Tensor | None, mask: Tensor, advantages: Tensor, *, clip_range: float, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """GRPO on tokens; returns (loss 0-dim, metrics).

    new, old, ref (n, L): log-probabilities of the sampled tokens under the policy, the one that sampled, and the frozen
    reference (None with beta 0). mask (n, L), advantages (n,), one for all tokens of a sequence.
    max(-A ratio, -A clamp(ratio, 1 +- clip_range)) + beta `kl_tokens`, averaged over a sequence's tokens, then over sequences.
    """
    ratio = torch.exp(new - old.detach())
    adv = advantages.to(new)[:, None]
    surrogate = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip_range, 1 + clip_range))
    kl = kl_tokens(new, ref.detach()) if ref is not None else torch.zeros_like(new)
    loss = sequence_mean(surrogate + beta * kl, mask).mean()
    with torch.no_grad():
        off = (ratio - 1).abs()[mask.bool()]
        metrics = {
            "loss": loss.item(),
            "kl": sequence_mean(kl, mask).mean().item(),
            "ratio_deviation": off.max().item() if len(off) else 0.0,
            "clip_fraction": (off > clip_range).float().mean().item() if len(off) else 0.0,
            "approx_kl": 0.5 * sequence_mean((new - old).square(), mask).mean().item(),
        }
    return loss, metrics
