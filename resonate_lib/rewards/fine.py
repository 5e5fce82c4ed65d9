"""Fine-grained AQA: besides the whole caption, a judge is asked about each event by itself, about counts, and about the relation.

`questions` makes them of a prompt record, in TTA-Bench's schema or with the embedded world's groups. `FineLalm` puts them to any
judge of `lalm`, `omni` or `remote` and joins the answers to one reward. The published benchmark asks the whole caption only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from resonate_lib.data.events import EVENTS
from resonate_lib.data.prompts import RELATION_NAMES
from resonate_lib.rewards.base import RewardResult

ANSWER = "Please only answer yes or no, without other explanations."  # as in the published question
EVENT = f"Does this audio contain the sound of {{event}}? {ANSWER}"
COUNT = f"Does {{event}} sound exactly {{times}} in this audio? {ANSWER}"
SEQUENCE = f"Do these sounds occur one after another in this order: {{events}}? {ANSWER}"
PARALLEL = f"Do these sounds occur at the same time: {{events}}? {ANSWER}"
# TTA-Bench's "complex" mixes the two within one prompt and does not say how: only the caption knows.
COMPLEX = f"Do the sounds in this audio follow one another and overlap as described by the text: {{caption}}? {ANSWER}"
TIMES = {1: "once", 2: "twice", 3: "three times"}
PARTS = ("event", "count", "relation")
COUNTED = re.compile(r"(.+) x(\d+)")  # "dog x3" in an event_list
NAN = float("nan")


def events_of(record: dict) -> list[tuple[str, int]]:
    """(event, how often) of a prompt record: its `groups`, else its `event_list` ("dog x3": three times; alone: once).

    Raises ValueError for a record that has neither.
    """
    if record.get("groups"):
        return [(str(name), int(count)) for name, count in record["groups"]]
    listed = record.get("event_list")
    if not listed or isinstance(listed, str) or not all(isinstance(event, str) and event.strip() for event in listed):
        raise ValueError(
            f"prompt {record.get('id', '?')!r} has event_list={listed!r}: fine-grained questions need a list of the events asked "
            f"for; use the reward lalm for prompts without one"
        )
    found = [(event, COUNTED.fullmatch(event)) for event in listed]
    return [(match[1], int(match[2])) if match else (event, 1) for event, match in found]


def count_question(event: str, count: int) -> str:
    """Whether the event sounds exactly `count` times."""
    return COUNT.format(event=event, times=TIMES.get(count, f"{count} times"))


def relation_question(events: Sequence[str], relation: str, caption: str = "") -> str:
    """Whether the events stand in this relation: sequence (in their order), parallelism, or any other as the caption has it."""
    if relation == "sequence":
        return SEQUENCE.format(events=", then ".join(events))
    if relation == "parallelism":
        return PARALLEL.format(events=" and ".join([", ".join(events[:-1]), events[-1]]))
    return COMPLEX.format(caption=caption)


def questions(record: dict, caption: str) -> list[tuple[str, str]]:
    """(part, question) of everything asked about one clip: each event, its count where events can be counted (more than one is
    asked for, or a countable event of the embedded world), and the relation of several events where the record names one.

    part: one of PARTS. Raises ValueError for a record without events.
    """
    events, relation = events_of(record), RELATION_NAMES.get(record.get("relation"), record.get("event_relation"))
    asked = [("event", EVENT.format(event=name)) for name, _ in events]
    for name, count in events:
        if count > 1 or (name in EVENTS and EVENTS[name].countable):
            asked.append(("count", count_question(name, count)))
    if len(events) > 1 and relation not in (None, "", "None"):
        asked.append(("relation", relation_question([name for name, _ in events], relation, caption)))
    return asked


class FineLalm:
    """A judge's answers about every event, count and relation of a prompt, joined to one score in (0, 1): their geometric mean.

    judge: anything with `ask`. metadata must hold the prompt records, with `event_list` or `groups` (ValueError otherwise).
    Parts: `event_mean`, `event_min`: of the events' scores; `count`: mean of the counts'; `relation`: the relation's (nan where
    none was asked); `questions`: how many; `p_yes_mass`: mean of the judge's own, where it has one.
    """

    def __init__(self, judge, name: str = "lalm_fine"):
        self.judge, self.name = judge, name

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        if metadata is None:
            raise ValueError(f"reward {self.name!r} got no prompt records: it asks about their event_list; pass metadata")
        asked = [questions(record, prompt) for record, prompt in zip(metadata, prompts, strict=True)]
        of = torch.tensor([row for row, own in enumerate(asked) for _ in own])
        told = self.judge.ask(audio, sample_rate, [text for own in asked for _, text in own], clips=of.tolist())
        scores, part = told.scores.float().cpu(), [kind for own in asked for kind, _ in own]

        def each(kind: str | None = None) -> list[Tensor]:
            chosen = torch.tensor([kind in (None, one) for one in part])
            return [scores[chosen & (of == row)] for row in range(len(asked))]

        def mean(values: list[Tensor]) -> Tensor:
            return torch.stack([value.mean() for value in values])  # nan of nothing

        events = each("event")
        parts = {"event_mean": mean(events), "event_min": torch.stack([value.min() for value in events])}
        parts |= {kind: mean(each(kind)) for kind in PARTS[1:]}
        parts["questions"] = torch.bincount(of, minlength=len(asked)).float()
        if "p_yes_mass" in told.parts:
            parts["p_yes_mass"] = torch.zeros(len(asked)).index_add(0, of, told.parts["p_yes_mass"].float()) / parts["questions"]
        return RewardResult(torch.stack([joined(value) for value in each()]), parts)


def joined(scores: Tensor) -> Tensor:
    """The geometric mean of one clip's scores (Q,): one event that is missing is not made up for by the others.

    Measured with a small judge after 210 steps of learning these questions: true prompts of 300 held-out scenes above near misses
    with AUC 0.948 (arithmetic mean 0.931, least score 0.956, events' mean times the relation's 0.908; the whole caption 0.971);
    in 717 pairs of generated siblings the first three agree with the independent judge alike (0.76 to 0.77, the events' mean
    alone 0.67). The least score says nothing of the parts that are not the worst.
    """
    return scores.clamp_min(1e-6).log().mean().exp()


def taught(judge) -> bool:
    """Whether a judge may be asked single questions: published ones may, a small one if its card tells of them."""
    return judge is not None and (getattr(judge, "card", None) is None or "questions" in judge.card)


class FineColumns:
    """Columns `fine`, `fine_events` (mean over the events) and `fine_relation` of the benchmark's rows by one judge; nan where a
    record lists no events. A scorer of `ttabench.evaluate`: it has the `score` of a judge."""

    def __init__(self, judge, sample_rate: int):
        self.reward, self.sample_rate = FineLalm(judge, "fine"), sample_rate

    def score(self, audio: Tensor, records: Sequence[dict]) -> dict[str, Tensor]:
        """{column: (B,) scores}, nan for records that list no events."""
        found = {name: torch.full((len(records),), NAN) for name in ("fine", "fine_events", "fine_relation")}
        rows = [i for i, record in enumerate(records) if record.get("groups") or record.get("event_list")]
        if rows:
            kept = [records[i] for i in rows]
            told = self.reward(audio[rows], self.sample_rate, [record["prompt_text"] for record in kept], kept)
            for name, values in zip(found, (told.scores, told.parts["event_mean"], told.parts["relation"]), strict=True):
                found[name][rows] = values
        return found
