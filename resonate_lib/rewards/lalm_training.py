"""Training the small audio language model of `lalm` from nothing: first the audio tower on frame-level events, then
questions and captions together.

The template puts the clip first, so everything up to its end is the same for every question about it, and so are the
question's words up to the caption. A row therefore holds the clip once, that stem once, and then several captions that
cannot see one another: each token attends to the shared prefix, the stem if it belongs to a question, and its own
segment, and counts its positions from their end. That equals separate sequences exactly and costs less than half (a test
checks it against the model's own forward).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from resonate_lib.rewards.base import initial_seed, learning_rate_at
from resonate_lib.rewards.clap import activity_loss
from resonate_lib.rewards.lalm import (
    DEFAULT_SHAPE,
    DESCRIBE,
    LalmReward,
    LalmShape,
    PromptFrame,
    build_model,
    build_processor,
    card_of,
    log_mel,
)

POSITIVE, NEGATIVE, CAPTION = 0, 1, 2  # what an answer token belongs to
PADDING, PREFIX, STEM, DESCRIPTION = -1, 0, 1, 2  # whose a token is; questions count from 3


def plain_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Attention as two batched products, as transformers calls it: query, key, value (B, heads, L, D), attention_mask
    boolean or None; returns ((B, L, heads, D), None).

    On a CPU in bfloat16 the backward of the fused kernel takes two to six times as long (125 to 290 positions).
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)

@dataclass
class Packed:
    """Rows of one clip and several questions. ids, positions (B, L) and mask (B, 1, L, L) bool feed the language model;
    answers (A,) are the tokens to predict from the hidden states at rows, columns (A,), kinds (A,) what they are."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    answers: Tensor
    kinds: Tensor


class Packer:
    """Turns captions and their hard negatives into packed rows for one processor."""

    def __init__(self, processor: Qwen2AudioProcessor):
        self.encode = processor.tokenizer.encode
        self.asked, self.described = PromptFrame(processor), PromptFrame(processor, DESCRIBE)
        self.prefix = self.encode(self.asked.prefix)
        self.audio_start = self.prefix.index(processor.audio_token_id)
        self.audio_count = self.prefix.count(processor.audio_token_id)
        self.yes, self.no = self.encode("Yes"), self.encode("No")
        self.end, self.pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
        self.stem = self.encode(self.asked.tail.partition("{caption}")[0].rstrip())
        self._known: dict[str, list[int]] = {}

    def _question(self, caption: str) -> list[int]:
        """Token ids of the question from the caption on, without the stem."""
        if caption not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            whole = self.encode(self.asked.suffix(caption))
            if whole[: len(self.stem)] != self.stem:
                raise ValueError(f"the question about {caption!r} does not begin with the same tokens as the others")
            self._known[caption] = whole[len(self.stem) :]
        return self._known[caption]

    def segments(self, caption: str, false_captions: Sequence[str]) -> list[tuple[list[int], list[int], int]]:
        """(prompt ids after the stem, answer ids, kind) of every question about one clip, and last the description."""
        rows = [(self._question(caption), self.yes, POSITIVE)]
        rows += [(self._question(false), self.no, NEGATIVE) for false in false_captions]
        return rows + [(self.encode(self.described.suffix()), [*self.encode(caption), self.end], CAPTION)]

    def __call__(self, captions: Sequence[str], false_captions: Sequence[Sequence[str]]) -> Packed:
        """captions: B true ones. false_captions: B lists of false ones, possibly empty."""
        pairs = zip(captions, false_captions, strict=True)
        laid = [self._lay(self.segments(caption, false)) for caption, false in pairs]
        length = max(len(ids) for ids, *_ in laid)

        def stack(column: int, fill: int) -> Tensor:
            return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in laid])

        ids, positions, owner = stack(0, self.pad), stack(1, 0), stack(2, PADDING)
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        seen, sees = owner[:, None, :], owner[:, :, None]
        # Padding attends to itself and the prefix, so no row of the mask is empty.
        mask = earlier & ((seen == PREFIX) | (seen == sees) | ((seen == STEM) & (sees > DESCRIPTION)))
        found = [(row, *answer) for row, (*_, answers) in enumerate(laid) for answer in answers]
        rows, columns, answers, kinds = torch.tensor(found).T
        return Packed(ids, positions, mask[:, None], rows, columns, answers, kinds)

    def _lay(self, segments: list[tuple[list[int], list[int], int]]) -> tuple[list, list, list, list]:
        """One row: ids, positions, owner, answers (column, token, kind)."""
        common, asked = len(self.prefix), len(self.prefix) + len(self.stem)
        ids, positions, answers = self.prefix + self.stem, list(range(asked)), []
        owner = [PREFIX] * common + [STEM] * len(self.stem)
        for number, (prompt, answer, kind) in enumerate(segments, start=DESCRIPTION + 1):
            first = len(ids) + len(prompt) - 1
            answers += [(first + k, token, kind) for k, token in enumerate(answer)]
            segment = prompt + answer[:-1]  # nothing is predicted from an answer's last token
            start = common if kind == CAPTION else asked
            ids += segment
            positions += range(start, start + len(segment))
            owner += [DESCRIPTION if kind == CAPTION else number] * len(segment)
        return ids, positions, owner, answers


def answer_logits(model: Qwen2AudioForConditionalGeneration, packer: Packer, packed: Packed, heard: Tensor) -> Tensor:
    """Logits (A, vocabulary) at the answer positions; heard (B, audio tokens, width) is what the audio tower gives."""
    core, device = model.model, heard.device
    sound = core.multi_modal_projector(heard)
    embedded = core.get_input_embeddings()(packed.ids.to(device)).to(sound.dtype)
    start, stop = packer.audio_start, packer.audio_start + packer.audio_count
    embedded = torch.cat([embedded[:, :start], sound, embedded[:, stop:]], dim=1)
    hidden = core.language_model(
        inputs_embeds=embedded,
        attention_mask=packed.mask.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[packed.rows.to(device), packed.columns.to(device)])


def answer_loss(logits: Tensor, packed: Packed, caption_weight: float) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the answer tokens in nats: the mean of yes and no questions, half each, plus the captions' mean
    per token times caption_weight. Also returns the numbers to log; `accuracy` is that of the first answer token."""
    kinds, answers = packed.kinds.to(logits.device), packed.answers.to(logits.device)
    losses = F.cross_entropy(logits.float(), answers, reduction="none")
    right = (logits.argmax(-1) == answers).float().detach()
    zero = losses.new_zeros(())
    mean = {k: losses[kinds == k].mean() if (kinds == k).any() else zero for k in (POSITIVE, NEGATIVE, CAPTION)}
    asked = 0.5 * (mean[POSITIVE] + mean[NEGATIVE])
    loss = asked + caption_weight * mean[CAPTION]
    numbers = {"loss": loss.item(), "question": asked.item(), "caption": mean[CAPTION].item()}
    for name, kind in (("yes_right", POSITIVE), ("no_right", NEGATIVE)):
        numbers[name] = right[kinds == kind].mean().item() if (kinds == kind).any() else float("nan")
    return loss, numbers


def draw_negatives(negatives: Sequence[dict], count: int, generator: torch.Generator) -> list[list[str]]:
    """count false captions a clip: a wrong number always where the clip has one, other kinds drawn uniformly.

    Clips with several occurrences are rare, and who is not taught on them lets a generator repeat an event for free.
    """
    chosen = []
    for row in negatives:
        kinds = sorted(row)
        order = torch.randperm(len(kinds), generator=generator).tolist()
        order = sorted(order, key=lambda k: kinds[k] != "count")[:count]
        chosen.append([row[kinds[k]] for k in order])
    return chosen


def gather_texts(corpus, seed: int, *, size: int = 64, batches: int = 16) -> list[str]:
    """The captions and negatives of the first batches of a corpus, to build a vocabulary from."""
    texts = set()
    for number in range(batches):
        batch = corpus.batch(initial_seed(seed, number + 1), size)
        texts.update(batch["captions"])
        texts.update(caption for row in batch["negatives"] for caption in row.values())
    return sorted(texts)


def fit_lalm(
    corpus,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    warmup_steps: int = 0,
    shape: LalmShape = DEFAULT_SHAPE,
    texts: Sequence[str] | None = None,
    learning_rate: float = 1e-3,
    negatives_per_clip: int = 3,
    caption_weight: float = 1.0,
    activity_weight: float = 0.5,
    checkpoint: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> tuple[LalmReward, list[dict]]:
    """Trains the judge from nothing; returns the reward and the history (losses in nats, shares of right answers).

    corpus.batch(generator, size) -> dict(audio (B, T) float32 at 16 kHz, captions, negatives: list of {kind: caption},
    activity (B, frames, classes) in [0, 1]). The first warmup_steps of `steps` train the audio tower alone to tell
    which events sound when, through a linear head that is thrown away (and kept on with weight activity_weight); the
    others also ask one true and negatives_per_clip false captions a clip, yes and no weighing half each, and ask for
    the caption. texts: what the vocabulary is built from; None reads 1,024 clips' captions and negatives.
    """
    from resonate_lib.training import autocast, fit

    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps={warmup_steps} of steps={steps}: leave at least one step for the questions")
    processor = build_processor(gather_texts(corpus, seed) if texts is None else texts, shape)
    model = build_model(processor, shape, seed=seed).to(device).train()
    classes = corpus.batch(initial_seed(seed), 1)["activity"].shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(shape.width, classes).to(device)
    packer, tower = Packer(processor), model.model.audio_tower
    if device == "cpu":
        model.set_attn_implementation("plain")
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate)
        batch = corpus.batch(generator, batch_size)
        features = log_mel(batch["audio"].to(device), processor.feature_extractor)
        with autocast(precision, device):
            heard = tower(features).last_hidden_state
            active = activity_loss(head(heard), batch["activity"].to(device))
            loss, numbers = active, {"activity": active.item()}
            if i >= warmup_steps:
                packed = packer(batch["captions"], draw_negatives(batch["negatives"], negatives_per_clip, generator))
                asked, more = answer_loss(answer_logits(model, packer, packed, heard), packed, caption_weight)
                loss, numbers = asked + activity_weight * active, numbers | more
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return numbers

    modules = {"model": model, "head": head, "optimizer": optimizer}
    history = fit(step, steps=steps, modules=modules, label="LALM", seed=seed, checkpoint=checkpoint)
    model.set_attn_implementation("sdpa")
    card = card_of(shape, seed=seed, steps=steps, warmup_steps=warmup_steps, batch_size=batch_size,
                   negatives_per_clip=negatives_per_clip)
    return LalmReward(model, processor, card=card | {"learning_rate": learning_rate}), history
