"""A judge behind an OpenAI-compatible chat-completions server, such as `vllm serve Qwen/Qwen2.5-Omni-7B --max-logprobs 20`.

The server gets the published question and the clip as 16 kHz float WAV, and sends the log-probabilities of the answer's
first token; the score is made of them as `omni` makes it of logits. Needs nothing beyond the standard library's client.
"""

from __future__ import annotations

import abc
import base64
import http.client
import io
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import soundfile
import torch
from torch import Tensor

from resonate_lib.rewards.base import RewardResult, clip_of
from resonate_lib.rewards.lalm import NO, YES, published, refuse_control_tokens
from resonate_lib.rewards.omni import FALLBACKS, FAMILIES, Family, check_choices, conversation, judged, to_clips

RATE = 16000  # Hz, what the judges hear
LONGEST = 300.0  # seconds
KEY = "RESONATE_LALM_KEY"  # environment variable; not a provider's own, so that no other key is sent to a server by accident
ANY = Family("", "", (), "", len)  # a model whose name tells nothing: no system text, any spelling is a reply
NEVER = -1e4  # stands for a log-probability of minus infinity
AGAIN = (408, 425, 429)  # besides 5xx: statuses that may pass


class Client(abc.ABC):
    """Requests to a chat-completions server, several at a time; what is asked and how a reply is read are its subclasses'.

    source: `http://host:port/v1#model`, the model as the server names it. in_flight: requests at a time. timeout: seconds that
    the server may be silent. attempts: tries a request gets, with pauses of backoff, 2·backoff, 4·backoff … seconds between
    them. A key is read from the environment variable RESONATE_LALM_KEY and never shown.
    Raises ConnectionError when the server cannot be reached or keeps failing, ValueError for a refusal or a reply of another
    form, one line each.
    """

    role = "judge"  # what errors call the server

    def __init__(
        self, source: str, *, in_flight: int = 8, timeout: float = 60.0, attempts: int = 4, backoff: float = 0.5, top: int = 20
    ):
        if min(in_flight, attempts, top) < 1 or not timeout > 0 or not backoff >= 0:
            raise ValueError(
                f"in_flight={in_flight}, attempts={attempts}, top={top}, timeout={timeout}, backoff={backoff}: "
                f"the first three are 1 or more, timeout above 0, backoff 0 or more"
            )
        self.at, self.model = _address(source)
        self.url = f"{self.at.scheme}://{self.at.hostname}{f':{self.at.port}' if self.at.port else ''}{self.at.path}"
        self.family = family_named(self.model)
        self.in_flight, self.timeout, self.attempts, self.backoff, self.top = in_flight, timeout, attempts, backoff, top

    @abc.abstractmethod
    def read(self, reply: bytes):
        """What a reply says; each kind of client has its own."""

    def send(self, bodies: Iterable[Callable[[], dict]], count: int) -> list:
        """`read` of the replies to `count` requests, each made when it is its turn; after one failure nothing more is sent."""
        stop, failed = threading.Event(), []

        def ask(body: Callable[[], dict]):
            try:
                return self._ask(body(), stop)
            except Exception as error:
                failed.append(error)  # the first is the reason, what follows was stopped by it
                stop.set()
                raise

        with ThreadPoolExecutor(max(1, min(self.in_flight, count))) as pool:
            try:
                return list(pool.map(ask, bodies))
            except Exception:
                raise failed[0] from None
            finally:  # after one failure, or Ctrl-C, nothing more is sent
                stop.set()

    def _ask(self, request: dict, stop: threading.Event):
        body = json.dumps(request).encode()
        for attempt in range(self.attempts):
            if stop.wait(self.backoff * 2 ** (attempt - 1) if attempt else 0):
                break
            try:
                status, reply = self._post(body)
            except (OSError, http.client.HTTPException) as error:
                reason = "no answer in time" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self.read(reply)
            reason = f"status {status}: {self._shown(reply)}"
            if status < 500 and status not in AGAIN:
                raise ValueError(f"{self.role} at {self.url} refuses the request, {reason}; {_advice(status, reply)}")
        else:
            raise ConnectionError(
                f"{self.role} at {self.url}: {self.attempts} attempts failed, the last with {reason}; start the server or correct "
                f"its address, or raise timeout={self.timeout:g}"
            )
        raise ConnectionError(f"{self.role} at {self.url}: stopped, another request failed")

    def _post(self, body: bytes) -> tuple[int, bytes]:
        kind = http.client.HTTPSConnection if self.at.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.at.hostname, self.at.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        try:
            connection.request("POST", f"{self.at.path.rstrip('/')}/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def choices(self, reply: bytes) -> list[dict]:
        """The choices of a chat completion, at least one. ValueError for another reply."""
        try:
            found = json.loads(reply)["choices"]
            [one.get("logprobs") for one in (found[0], *found)]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{self.role} at {self.url} sends no chat completion but {self._shown(reply)!r}; "
                             "name an OpenAI-compatible /v1 address") from None  # fmt: skip
        return found

    def _shown(self, reply: bytes) -> str:
        text = " ".join(reply.decode("utf-8", "replace").split())[:200] or "an empty reply"
        return text.replace(os.environ[KEY], "***") if os.environ.get(KEY) else text


class RemoteJudge(Client):
    """The published question put to a server; scores and parts as AudioJudge gives them. Options and errors: `Client`.

    A model's name with Qwen2.5-Omni, Qwen3-Omni or Qwen2-Audio in it gets that family's messages and replies. Only the `top`
    likeliest tokens come back. A side with no spelling among them counts as the least of them, so that its score errs towards
    1/2; where both are absent `p_yes_mass` is 0, `rare` 1, and the score 1/2 or, with fallback "zero", 0.
    """

    def __init__(self, source: str, *, fallback: str = "sigmoid", **options):
        check_choices(fallback=(fallback, FALLBACKS))
        super().__init__(source, **options)
        self.fallback = fallback

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        return self.ask(audio, sample_rate, published(prompts))

    def ask(
        self, audio: Tensor, sample_rate: int, questions: Sequence[str], clips: Sequence[int] | None = None
    ) -> RewardResult:
        """Scores (Q,) and parts of Q questions in full, a request each. clips: the row of audio that each is about; None: the
        i-th question is about the i-th clip."""
        for question in questions:
            refuse_control_tokens(question, re.findall(r"<\|[^<>|]*\|>", question))
        heard = to_clips(audio, sample_rate, questions if clips is None else range(len(audio)), RATE, LONGEST)
        of = clip_of(questions, len(heard), clips)
        bodies = (partial(self.body, heard[clip], question) for question, clip in zip(questions, of, strict=True))
        answers = self.send(bodies, len(questions))
        logit, mass, answered = (torch.tensor(column) for column in zip(*answers, strict=True))
        return judged(logit.float(), mass.float(), answered, self.fallback)

    def question(self, caption: str) -> str:
        """What is asked of a clip, as the server is told, to be read."""
        return json.dumps(conversation(self.family, {"type": "input_audio"}, *published([caption])), indent=1)

    def body(self, clip: Tensor, question: str) -> dict:
        """The request for a question about one clip (T,) at 16 kHz: one token, greedy, with its `top` log-probabilities."""
        return {
            "model": self.model,
            "messages": conversation(self.family, sound_of(clip), question),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": self.top,
        }

    def read(self, reply: bytes) -> tuple[float, float, bool]:
        """Logit, share of probability of yes and no, and whether the likeliest token is a reply, of one server's answer."""
        found = self.choices(reply)[0].get("logprobs")
        try:
            tokens = [(str(one["token"]), max(float(one["logprob"]), NEVER)) for one in found["content"][0]["top_logprobs"]]
        except (LookupError, TypeError, ValueError):
            tokens = []
        if not tokens or any(math.isnan(value) for _, value in tokens):
            raise ValueError(
                f"judge at {self.url} sends no top_logprobs (asked for logprobs=true, top_logprobs={self.top}); use a server "
                f"that has them, with vLLM started with --max-logprobs {self.top} or more"
            )
        yes, no = ([value for token, value in tokens if token in words] for words in (YES, NO))
        said = max(tokens, key=lambda one: one[1])[0]
        least = min(value for _, value in tokens)
        logit = _joined(yes or [least]) - _joined(no or [least]) if yes or no else 0.0
        mass = sum(math.exp(value) for value in (*yes, *no))
        return logit, min(mass, 1.0), said in (self.family.replies or (*YES, *NO))


def sound_of(clip: Tensor) -> dict:
    """A clip (T,) at 16 kHz as a message's part."""
    buffer = io.BytesIO()
    soundfile.write(buffer, clip.cpu().numpy(), RATE, format="WAV", subtype="FLOAT")  # 16 bits are heard in quiet clips
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(buffer.getvalue()).decode("ascii"), "format": "wav"}}


def family_named(model: str) -> Family:
    """The family that a model's name tells of; without system text and for every spelling where it tells of none."""
    name = re.sub(r"[^a-z0-9]", "", model.lower())
    for key, mark in (("qwen2_5_omni", "qwen25omni"), ("qwen3_omni_moe", "qwen3omni"), ("qwen2_audio", "qwen2audio")):
        if mark in name:
            return FAMILIES[key]
    return ANY


def _address(source: str):
    """The parts of `http://host:port/v1#model`, and the model."""
    try:
        parts = urlsplit(source)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.fragment and "@" not in parts.netloc
        fits = fits and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or a bracket that makes no sense
        fits = False
    if not fits:
        shown = re.sub(r"//.*@", "//***@", source)
        raise ValueError(
            f"judge server {shown!r}: write http://host:port/v1#model-name, without user or key (a key goes into {KEY})"
        )
    return parts, parts.fragment


def _joined(values: Sequence[float]) -> float:
    """log of the sum of exp(values)."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def _advice(status: int, reply: bytes) -> str:
    if b"logprobs" in reply:
        return "start vLLM with --max-logprobs 20 or ask for fewer with top="
    if status in (401, 403):
        return f"put the server's key into the environment variable {KEY}"
    if status == 404:
        return "correct the address or the model's name after #"
    return "check that the model hears audio (vLLM: --limit-mm-per-prompt) and that the clip is not too long"
