"""Hypotheses sampled by an engine: a vLLM or SGLang server with a recogniser of the policy's class, by the judge's client.

The engine samples with the weights it was started with. What it says is scored anew by the policy that learns, so ratios begin at
1; how far both differ is measured (`gap`) and shown, since the further they part the less the samples are the policy's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from resonate_lib.rewards.omni import conversation
from resonate_lib.rewards.remote import Client, sound_of
from resonate_lib.speech.recognition import INSTRUCTION


class Reply(NamedTuple):
    """A sampled transcript, whether it came to its end by itself, and its log-probability in nats (nan where none was sent)."""

    text: str
    ended: bool
    log_prob: float


class Engine(Client):
    """Samples transcripts of clips; a request a clip. Options and errors: `Client`."""

    role = "engine"

    def sample(
        self, clips: Sequence[Tensor], *, group_size: int, max_new_tokens: int, temperature: float, top_p: float,
        generator: torch.Generator,
    ) -> list[list[Reply]]:  # fmt: skip
        """group_size replies for each of B clips (T_i,) at 16 kHz; one seed a clip is drawn from the generator and sent along."""
        seeds = torch.randint(2**31, (len(clips),), generator=generator).tolist()
        settings = {"n": group_size, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        bodies = (partial(self.body, clip, settings | {"seed": seed}) for clip, seed in zip(clips, seeds, strict=True))
        found = self.send(bodies, len(clips))
        few = min(map(len, found))
        if few < group_size:
            raise ValueError(f"engine at {self.url} sends {few} of n={group_size} choices; use a server that samples several")
        return [replies[:group_size] for replies in found]

    def body(self, clip: Tensor, settings: dict) -> dict:
        """The request for one clip (T,) at 16 kHz."""
        messages = conversation(self.family, sound_of(clip), INSTRUCTION)
        return {"model": self.model, "messages": messages, "logprobs": True, **settings}

    def read(self, reply: bytes) -> list[Reply]:
        """The choices of one server's answer; one without text is an empty transcript."""
        return [_reply(choice) for choice in self.choices(reply)]


def _reply(choice: dict) -> Reply:
    try:
        log_prob = sum(float(token["logprob"]) for token in choice["logprobs"]["content"])
    except (LookupError, TypeError, ValueError):
        log_prob = float("nan")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return Reply(text.strip() if isinstance(text, str) else "", choice.get("finish_reason") != "length", log_prob)
