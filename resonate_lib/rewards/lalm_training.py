"""Training the small audio language model of `lalm` from nothing: first the audio tower on frame-level events, then
questions and captions together.

It learns all forms of questions at once: the published one about a whole caption, with hard negatives, and those of `fine` about
single events, counts and relations. All questions about a clip stand in one row (`packing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor

from resonate_lib.data import scenes
from resonate_lib.data.prompts import RELATION_NAMES
from resonate_lib.rewards import fine
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
    published,
)
from resonate_lib.rewards.packing import Packed, Tree, hidden_states, pack

POSITIVE, NEGATIVE, CAPTION, FINE_YES, FINE_NO = range(5)  # what an answer token belongs to
# Events that are easily taken for one another: half of the absent ones asked about are of the family of one that sounds.
FAMILIES = (
    ("dog", "cow", "duck", "frog", "owl", "rooster", "bird"),
    ("rain", "waves", "static", "engine", "explosion"),
    ("siren", "busy signal", "ding", "car horn", "whistle", "beep", "bird"),
)
WEIGHTS = (0.5, 0.5, 1.0, 0.5, 0.5)  # of the kinds' mean losses: yes and no weigh half each
ROWS_AT_ONCE = 16  # clips in one forward and backward of the language model: 48 at once take 1.3 times as long, 8 1.2 times


def plain_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Attention as two batched products, as transformers calls it: query, key, value (B, heads, L, D), attention_mask what is
    added to the scores, or None; returns ((B, L, heads, D), None).

    On a CPU in bfloat16 the backward of the fused kernel takes two to six times as long (125 to 290 positions).
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("plain", plain_attention)


@dataclass
class Lesson(Packed):
    """Packed rows with the tokens to predict, answers (A,), and what they belong to, kinds (A,)."""

    answers: Tensor
    kinds: Tensor


class Row(NamedTuple):
    """What is asked about one clip: a tree of tokens, the places its answers are read at, and (token, kind) of every answer
    token."""

    tree: Tree
    places: list[int]
    targets: list[tuple[int, int]]


class Packer:
    """Turns captions, their hard negatives and fine questions into packed rows for one processor."""

    def __init__(self, processor: Qwen2AudioProcessor):
        self.encode, self.frame = processor.tokenizer.encode, PromptFrame(processor)
        self.trunk = self.encode(self.frame.prefix)
        self.audio_start = self.trunk.index(processor.audio_token_id)
        self.yes, self.no = self.encode("Yes"), self.encode("No")
        self.end, self.pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
        self._known: dict[str, list[int]] = {}

    def _question(self, question: str) -> list[int]:
        """Token ids of a question after the trunk."""
        if question not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[question] = self.encode(self.frame.suffix(question))
        return self._known[question]

    def segments(
        self, caption: str, false_captions: Sequence[str], asked: Sequence[tuple[str, bool]] = ()
    ) -> list[tuple[list[int], list[int], int]]:
        """(prompt ids after the trunk, answer ids, kind) of every question about one clip, and last the description."""
        rows = [(question, True, POSITIVE) for question in published([caption])]
        rows += [(question, False, NEGATIVE) for question in published(false_captions)]
        rows += [(question, truth, FINE_YES if truth else FINE_NO) for question, truth in asked]
        said = [(self._question(question), self.yes if truth else self.no, kind) for question, truth, kind in rows]
        return [*said, (self._question(DESCRIBE), [*self.encode(caption), self.end], CAPTION)]

    def row(self, caption: str, false_captions: Sequence[str], asked: Sequence[tuple[str, bool]] = ()) -> Row:
        """All `segments` of one clip."""
        row = Row(Tree(self.trunk), [], [])
        for prompt, answer, kind in self.segments(caption, false_captions, asked):
            path = row.tree.add(prompt + answer[:-1])  # nothing is predicted from an answer's last token
            row.places.extend(path[len(prompt) - 1 :])
            row.targets.extend((token, kind) for token in answer)
        return row

    def lesson(self, rows: Sequence[Row]) -> Lesson:
        """Rows as one batch."""
        places = [(number, place) for number, row in enumerate(rows) for place in row.places]
        packed = pack([row.tree for row in rows], self.pad, places)
        answers, kinds = torch.tensor([target for row in rows for target in row.targets]).T
        return Lesson(**vars(packed), answers=answers, kinds=kinds)

    def __call__(
        self,
        captions: Sequence[str],
        false_captions: Sequence[Sequence[str]],
        asked: Sequence[Sequence[tuple[str, bool]]] | None = None,
    ) -> Lesson:
        """captions: B true ones. false_captions: B lists of false ones, asked: B lists of (question, whether yes is right); both
        possibly empty."""
        asked = [()] * len(captions) if asked is None else asked
        return self.lesson([self.row(*clip) for clip in zip(captions, false_captions, asked, strict=True)])


def answer_logits(model: Qwen2AudioForConditionalGeneration, packer: Packer, packed: Packed, heard: Tensor) -> Tensor:
    """Logits (A, vocabulary) at the answer positions; heard (B, audio tokens, width) is what the audio tower gives."""
    kind = heard.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else heard.dtype
    mask = torch.zeros(packed.mask.shape, dtype=dtype).masked_fill_(~packed.mask, float("-inf"))  # once for all layers
    return model.lm_head(hidden_states(model, replace(packed, mask=mask), heard, packer.audio_start))


def answer_loss(logits: Tensor, packed: Lesson, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answer tokens in nats, weighed by WEIGHTS and divided by counts (5,), how many tokens of each kind
    the whole batch has: what its parts give adds up to the batch's mean. Also returns (2, 5): by kind, sums of losses and of
    right answers."""
    kinds, answers = packed.kinds.to(logits.device), packed.answers.to(logits.device)
    losses = F.cross_entropy(logits.float(), answers, reduction="none")
    weights = torch.tensor(WEIGHTS) / counts.clamp(min=1)
    loss = (losses * weights.to(losses)[kinds]).sum()
    right = (logits.argmax(-1) == answers).float()
    sums = torch.zeros(2, len(WEIGHTS)).index_add_(1, kinds.cpu(), torch.stack([losses, right]).detach().float().cpu())
    return loss, sums


def answer_numbers(sums: Tensor, counts: Tensor) -> dict[str, float]:
    """What to log of a batch: its loss, the mean losses of whole questions, captions and fine questions in nats, and shares of
    right answers (nan where nothing was asked). sums (2, 5) of `answer_loss`, added up over its parts; counts (5,)."""
    losses, right = (sums / counts.clamp(min=1)).tolist()
    right = [share if count else float("nan") for share, count in zip(right, counts.tolist(), strict=True)]
    return {
        "loss": sum(weight * value for weight, value in zip(WEIGHTS, losses, strict=True)),
        "question": 0.5 * (losses[POSITIVE] + losses[NEGATIVE]),
        "caption": losses[CAPTION],
        "fine": 0.5 * (losses[FINE_YES] + losses[FINE_NO]),
        "yes_right": right[POSITIVE],
        "no_right": right[NEGATIVE],
        "fine_yes_right": right[FINE_YES],
        "fine_no_right": right[FINE_NO],
    }


def learn_answers(
    model: Qwen2AudioForConditionalGeneration, packer: Packer, rows: Sequence[Row], heard: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Add the gradient of a batch's answers to the language model's weights; returns that of heard (B, audio tokens, width) and
    `answer_numbers`.

    ROWS_AT_ONCE clips at a time, by length: rows are filled up to the longest of those computed together.
    """
    counts = torch.bincount(torch.tensor([kind for row in rows for _, kind in row.targets]), minlength=len(WEIGHTS))
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].tree.ids))
    leaf, sums = heard.detach().requires_grad_(), torch.zeros(2, len(WEIGHTS))
    for start in range(0, len(order), ROWS_AT_ONCE):
        part = order[start : start + ROWS_AT_ONCE]
        packed = packer.lesson([rows[number] for number in part])
        loss, found = answer_loss(answer_logits(model, packer, packed, leaf[part]), packed, counts)
        loss.backward()
        sums += found
    return leaf.grad, answer_numbers(sums, counts)


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


def draw_questions(record: dict, rng: np.random.Generator, world_seed: int = 0) -> list[tuple[str, str, bool]]:
    """(part, question, whether yes is right) of fine questions about one scene, as many true as false: an event that sounds and
    one that does not, a count and a wrong one where something can be counted, the relation of several events and a wrong one.

    record: groups, relation and split. No false question holds a combination of events that is held out from the split.
    """
    spec = scenes.Spec.of(record)
    near = [name for family in FAMILIES if set(family) & set(spec.names) for name in family]
    pool = near if rng.random() < 0.5 else scenes.CLASSES
    absent = _one(rng, [name for name in pool if name not in spec.names])
    asked = [("event", fine.EVENT.format(event=name), name != absent) for name in (_one(rng, spec.names), absent)]
    countable = [group for group in spec.groups if group[0] in scenes.COUNTABLE]
    several = [group for group in countable if group[1] > 1]
    if several or (countable and rng.random() < 0.4):  # most events sound once: asked of all, "twice" would mean no
        name, count = _one(rng, several or countable)
        wrong = (name, _one(rng, [number for number in fine.TIMES if number != count]))
        if rng.random() < 0.25:
            wrong = (_one(rng, [other for other in scenes.COUNTABLE if other not in spec.names]), count)
        asked += [("count", fine.count_question(name, count), True), ("count", fine.count_question(*wrong), False)]
    if len(spec.groups) > 1:
        wrong = _wrong_relation(spec, rng, record["split"], world_seed)
        asked += [("relation", _relation(one, rng), one is spec) for one in (spec, wrong) if one]
    return asked


def one_part(asked: Sequence[tuple[str, str, bool]], rng: np.random.Generator) -> list[tuple[str, bool]]:
    """The (question, whether yes is right) of one part at random: the longest row of a batch decides what a step costs, 2.0 times
    as much with all parts of every clip as without any, 1.2 times with one."""
    kept = _one(rng, list(dict.fromkeys(part for part, _, _ in asked)))
    return [(question, truth) for part, question, truth in asked if part == kept]


def _relation(spec: scenes.Spec, rng: np.random.Generator) -> str:
    """The question about the spec's relation; of simultaneous events in either order."""
    names = list(spec.names) if spec.relation == "followed by" else [spec.names[i] for i in rng.permutation(len(spec.names))]
    return fine.relation_question(names, RELATION_NAMES[spec.relation])


def _wrong_relation(spec: scenes.Spec, rng: np.random.Generator, split: str, world_seed: int) -> scenes.Spec | None:
    """The spec with two neighbours swapped, the other relation, or an event replaced by one that does not sound."""
    single = tuple((name, 1) for name in spec.names)
    for _ in range(20):
        groups, draw, relation = list(single), rng.random(), spec.relation
        if draw < 0.35:
            absent = [name for name in scenes.CLASSES if name not in spec.names]
            groups[int(rng.integers(len(groups)))] = (_one(rng, absent), 1)
        elif relation == "followed by" and draw < 0.75:
            at = int(rng.integers(len(groups) - 1))
            groups[at], groups[at + 1] = groups[at + 1], groups[at]
        elif relation == "followed by":
            relation = "while"
        else:
            relation, groups = "followed by", [groups[i] for i in rng.permutation(len(groups))]
        wrong = scenes.Spec(tuple(groups), relation)
        if scenes.combination_split(wrong, world_seed) in (split, "train"):
            return wrong
    return None


def _one(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def fine_texts() -> list[str]:
    """Fine questions with every event and number of the embedded world, to build a vocabulary from."""
    asked = [fine.EVENT.format(event=name) for name in scenes.CLASSES]
    asked += [fine.count_question(name, count) for name in scenes.CLASSES for count in fine.TIMES]
    pairs = list(zip(scenes.CLASSES, scenes.CLASSES[1:], strict=False))
    return asked + [fine.relation_question(pair, relation) for pair in pairs for relation in ("sequence", "parallelism")]


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
    activity_weight: float = 0.5,
    checkpoint: Path | None = None,
    precision: str = "auto",
    device: str = "cpu",
) -> tuple[LalmReward, list[dict]]:
    """Trains the judge from nothing; returns the reward and the history (losses in nats, shares of right answers).

    corpus.batch(generator, size) -> dict(audio (B, T) float32 at 16 kHz, captions, negatives: list of {kind: caption},
    activity (B, frames, classes) in [0, 1]); where it also gives `positions`, corpus.records holds scenes there (groups,
    relation, split), and `one_part` of the questions of `draw_questions` is asked too. The first warmup_steps of `steps` train the
    audio tower alone to tell which events sound when, through a linear head that is thrown away (and kept on with weight
    activity_weight); the others also ask one true and negatives_per_clip false captions a clip, yes and no weighing half each,
    and ask for the caption. (600 steps of captions alone before any question cost more than they gained, in one trial that was
    stopped half-way.) texts: what the vocabulary is built from; None reads 1,024 clips' captions and negatives.
    """
    from resonate_lib.training import autocast, fit

    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps={warmup_steps} of steps={steps}: leave at least one step for the questions")
    texts = gather_texts(corpus, seed) if texts is None else texts
    processor = build_processor([*texts, *fine_texts()], shape)
    model = build_model(processor, shape, seed=seed).to(device).train()
    example = corpus.batch(initial_seed(seed), 1)
    classes, scenes_known = example["activity"].shape[-1], "positions" in example
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(shape.width, classes).to(device)
    packer, tower = Packer(processor), model.model.audio_tower
    if device == "cpu":
        model.set_attn_implementation("plain")
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def ask(batch: dict, generator: torch.Generator) -> list[Row]:
        false = draw_negatives(batch["negatives"], negatives_per_clip, generator)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        known = [corpus.records[position] for position in batch.get("positions", ())]
        asked = [one_part(draw_questions(record, rng, corpus.world_seed), rng) for record in known] or [()] * len(false)
        return [packer.row(*clip) for clip in zip(batch["captions"], false, asked, strict=True)]

    def step(i: int, generator: torch.Generator) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(i, steps, learning_rate)
        batch = corpus.batch(generator, batch_size)
        features = log_mel(batch["audio"].to(device), processor.feature_extractor)
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            heard = tower(features).last_hidden_state
            active = activity_loss(head(heard), batch["activity"].to(device))
            numbers = {"activity": active.item()}
            if i < warmup_steps:
                active.backward()
            else:
                gradient, answered = learn_answers(model, packer, ask(batch, generator), heard)
                torch.autograd.backward([activity_weight * active, heard], [None, gradient])
                numbers |= answered
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return numbers

    modules = {"model": model, "head": head, "optimizer": optimizer}
    history = fit(step, steps=steps, modules=modules, label="LALM", seed=seed, checkpoint=checkpoint)
    model.set_attn_implementation("sdpa")
    card = card_of(shape, seed=seed, steps=steps, warmup_steps=warmup_steps, batch_size=batch_size,
                   negatives_per_clip=negatives_per_clip, questions=["caption", *(fine.PARTS if scenes_known else ())])
    return LalmReward(model, processor, card=card | {"learning_rate": learning_rate}), history
