"""The judge behind a server, against a real HTTP server that runs the shipped small judge, and one that fails in every way."""

import base64
import io
import json
import math
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile
import torch

from resonate_lib.data import scenes
from resonate_lib.rewards import base
from resonate_lib.rewards.lalm import QUESTION, LalmReward
from resonate_lib.rewards.omni import SYSTEM, open_judge
from resonate_lib.rewards.remote import KEY, RemoteJudge, family_named

RATE = 16000
CAPTIONS = ["a bell", "rain falls, followed by a siren", "a siren", "a car horn and a bird", "a bird"]


@pytest.fixture(scope="module")
def small():
    return LalmReward.load(base.SHIPPED / "lalm")


@pytest.fixture(scope="module")
def audio():
    return 0.1 * torch.randn(5, RATE // 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def world():
    """Three scenes of the embedded world, each with its own caption, then with another's."""
    drawn = [np.random.default_rng(seed) for seed in range(3)]
    specs = [scenes.sample_spec(rng) for rng in drawn]
    waves = [torch.from_numpy(scenes.render(spec, rng)[0]).float() for spec, rng in zip(specs, drawn, strict=True)]
    said = [scenes.caption(spec, rng) for spec, rng in zip(specs, drawn, strict=True)]
    return torch.stack([*waves, *waves]), [*said, *said[1:], said[0]]


@contextmanager
def serving(answer):
    """A server on a free port; answer(request, headers) -> (status, bytes or dict)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, request, dict(self.headers), threading.current_thread().name))
            status, content = answer(request, self.headers)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has given up waiting

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def completion(top):
    entry = {"token": top[0][0], "logprob": top[0][1], "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}
    message = {"role": "assistant", "content": top[0][0]}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "logprobs": {"content": [entry]}}]}


def judging(small):
    """Answers as a server would that runs the small judge; one model, so one request at a time."""
    lock = threading.Lock()

    def answer(request, headers):
        parts = {part["type"]: part for part in request["messages"][-1]["content"]}
        question = parts["text"]["text"]
        data = base64.b64decode(parts["input_audio"]["input_audio"]["data"])
        clip, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert rate == RATE and parts["input_audio"]["input_audio"]["format"] == "wav"
        with lock:
            chance = small.logits(torch.from_numpy(clip)[None], [question])[0].log_softmax(-1)
        values, ids = chance.topk(request["top_logprobs"])
        decode = small.processor.tokenizer.decode
        return 200, completion([(decode([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True)])

    return answer


def quick(url, **options):
    return RemoteJudge(f"{url}#tiny", **({"backoff": 0.01, "timeout": 60.0, "attempts": 3} | options))


def test_scores_agree_with_the_judge_in_process(small, world):
    audio, captions = world
    expected = small(audio, RATE, captions)
    with serving(judging(small)) as (url, seen):
        judge = open_judge(f"{url}#tiny", in_flight=3)
        result = base.check_result(judge(audio, RATE, captions), len(captions))
    assert isinstance(judge, RemoteJudge)
    torch.testing.assert_close(result.scores, expected.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.parts["logit"], expected.parts["logit"], atol=0.05, rtol=0)  # rare spellings are cut off
    torch.testing.assert_close(result.parts["p_yes_mass"], expected.parts["p_yes_mass"], atol=1e-3, rtol=0)
    assert set(result.parts) == {"logit", "p_yes_mass", "rare"}
    assert expected.scores[:3].min() > expected.scores[3:].max() + 0.3  # clips and captions stayed together
    path, request, _, _ = seen[0]
    assert path == "/v1/chat/completions" and len(seen) == len(captions)
    sent = {part["text"] for _, request, _, _ in seen for part in request["messages"][-1]["content"] if part["type"] == "text"}
    assert sent == {QUESTION.format(caption=caption) for caption in captions}
    assert {key: request[key] for key in ("model", "max_tokens", "temperature", "logprobs", "top_logprobs")} == {
        "model": "tiny", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip


def test_several_questions_about_a_clip_are_a_request_each(small, world):
    audio, captions = world
    asked, clips = [QUESTION.format(caption=caption) for caption in captions[:4]], [2, 0, 0, 1]
    with serving(judging(small)) as (url, seen):
        judge = quick(url)
        result = judge.ask(audio[:3], RATE, asked, clips=clips)
        with pytest.raises(ValueError, match="4 questions about 3 clips, clips from 0 to 3"):
            judge.ask(audio[:3], RATE, asked, clips=[0, 1, 2, 3])
    torch.testing.assert_close(result.scores, small.ask(audio[clips], RATE, asked).scores, atol=1e-4, rtol=0)
    assert len(seen) == 4


def test_messages_are_those_of_the_models_family(audio):
    def parts(model):
        messages = RemoteJudge(f"http://localhost:1/v1#{model}").body(audio[0], "Is it a bell?")["messages"]
        return [message["role"] for message in messages], [part["type"] for part in messages[-1]["content"]], messages

    roles, order, messages = parts("Qwen/Qwen2.5-Omni-7B")
    assert roles == ["system", "user"] and order == ["text", "input_audio"]
    assert messages[0]["content"][0]["text"] == SYSTEM
    assert messages[1]["content"][0]["text"] == "Is it a bell?"
    assert parts("Qwen/Qwen3-Omni-30B-A3B-Instruct")[:2] == (["user"], ["text", "input_audio"])
    assert parts("/models/qwen2-audio-7b")[:2] == (["user"], ["input_audio", "text"])
    assert parts("judge")[:2] == (["user"], ["text", "input_audio"])
    assert family_named("Qwen3-Omni").replies == ("yes", "no")


def test_the_score_by_hand_from_what_is_listed():
    judge = RemoteJudge("http://localhost:1/v1#tiny")

    def read(*top, of=judge):
        logs = [(token, math.log(share)) for token, share in top]
        return of.read(json.dumps(completion(logs)).encode())

    logit, mass, answered = read(("Yes", 0.5), ("No", 0.2), (" yes", 0.1), ("Maybe", 0.05))
    assert logit == pytest.approx(math.log(0.6 / 0.2)) and mass == pytest.approx(0.8) and answered
    logit, mass, answered = read(("Well", 0.6), ("No", 0.3), ("Hm", 0.02))  # yes is no more than the least listed
    assert logit == pytest.approx(math.log(0.02 / 0.3)) and mass == pytest.approx(0.3) and not answered
    assert read(("Well", 0.9), ("Hm", 0.1)) == (0.0, 0.0, False)
    omni = RemoteJudge("http://localhost:1/v1#Qwen3-Omni")
    assert not read(("Yes", 0.9), ("no", 0.1), of=omni)[2] and read(("yes", 0.9), ("no", 0.1), of=omni)[2]


def test_neither_yes_nor_no_is_counted(audio):
    replies = iter([[("Well", -0.1), ("Hm", -3.0)], [("Yes", -0.1), ("No", -3.0)]] * 2)
    with serving(lambda request, headers: (200, completion(next(replies)))) as (url, _):
        kept = quick(url, in_flight=1)(audio[:2], RATE, CAPTIONS[:2])
        zeroed = quick(url, in_flight=1, fallback="zero")(audio[:2], RATE, CAPTIONS[:2])
    assert kept.parts["rare"].tolist() == [1.0, 0.0] and kept.parts["p_yes_mass"][0] == 0
    assert kept.scores[0] == 0.5 and zeroed.scores[0] == 0.0 and kept.scores[1] == zeroed.scores[1]


def test_requests_are_in_flight_together(audio):
    together = threading.Barrier(4, timeout=60)  # breaks unless four requests wait at once

    def answer(request, headers):
        together.wait()
        return 200, completion([("Yes", -0.1), ("No", -3.0)])

    with serving(answer) as (url, seen):
        quick(url, in_flight=4)(audio[:4], RATE, CAPTIONS[:4])
    assert len(seen) == 4


def test_a_passing_failure_is_tried_again(audio):
    left = iter([(500, b"busy"), (429, b"slow down"), (200, completion([("Yes", -0.1), ("No", -3.0)]))])
    with serving(lambda request, headers: next(left)) as (url, seen):
        assert quick(url)(audio[:1], RATE, ["a"]).scores[0] > 0.9
    assert len(seen) == 3


def failing(url, audio, **options):
    with pytest.raises((ConnectionError, ValueError)) as caught:
        quick(url, **options)(audio, RATE, CAPTIONS[: len(audio)])
    assert "\n" not in str(caught.value) and url in str(caught.value)
    return caught.value


def test_a_server_that_is_gone(audio):
    with serving(lambda request, headers: (200, b"")) as (url, _):
        pass
    error = failing(url, audio)
    assert isinstance(error, ConnectionError) and "3 attempts failed" in str(error) and "refused" in str(error)


def test_a_server_that_hangs(audio):
    release = threading.Event()
    with serving(lambda request, headers: (release.wait(60), (200, b""))[1]) as (url, _):
        error = failing(url, audio[:1], timeout=0.2, attempts=2)
        release.set()
    assert isinstance(error, ConnectionError) and "no answer in time" in str(error)


def test_a_server_that_fails_stops_the_other_requests(audio):
    with serving(lambda request, headers: (500, b"cuda\nout of memory")) as (url, seen):
        error = failing(url, audio, in_flight=1, attempts=2)
    assert isinstance(error, ConnectionError) and "status 500: cuda out of memory" in str(error)
    assert len(seen) == 2  # the first clip's attempts; the other four were never sent


@pytest.mark.parametrize("status, reply, said", [
    (200, b"<html>hello</html>", "sends no chat completion but '<html>"),
    (200, b"", "an empty reply"),
    (200, {"choices": []}, "sends no chat completion"),
    (200, [1, 2], "sends no chat completion"),
    (200, {"choices": [{"message": {"content": "Yes"}, "logprobs": None}]}, "no top_logprobs.*--max-logprobs 20"),
    (200, {"choices": [{"message": {"content": "Yes"}}]}, "no top_logprobs"),
    (200, {"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": -1}]}}]}, "no top_logprobs"),
    (200, {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": None}]}]}}]}, "no top_logprobs"),
    (400, b"top_logprobs of 20 is over the maximum of 5", "--max-logprobs 20 or ask for fewer"),
    (401, b"no key", f"environment variable {KEY}"),
    (404, b"no model", "model's name after #"),
    (400, b"At most 0 audio", "limit-mm-per-prompt"),
    (302, b"elsewhere", "refuses the request, status 302"),
])
def test_a_reply_of_another_form_is_one_line_and_no_second_try(audio, status, reply, said):
    with serving(lambda request, headers: (status, reply)) as (url, seen):
        error = failing(url, audio[:1])
    assert isinstance(error, ValueError) and re.search(said, str(error)), error
    assert len(seen) == 1


def test_the_key_is_sent_and_never_shown(audio, monkeypatch, capsys):
    monkeypatch.setenv(KEY, "secret-123")
    with serving(lambda request, headers: (400, f"bad key {headers['Authorization']}".encode())) as (url, seen):
        error = failing(url, audio[:1])
    assert seen[0][2]["Authorization"] == "Bearer secret-123"
    assert "secret-123" not in str(error) and "***" in str(error)
    assert "secret-123" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("source", [
    "http://localhost:8000/v1", "http://:8000/v1#m", "ftp://host/v1#m", "http://user:word@host/v1#m", "http://word@host/v1#m",
    "http://host:99999/v1#m", "http://[::1/v1#m",
])
def test_addresses_are_checked(source):
    with pytest.raises(ValueError, match="write http://host:port/v1#model-name") as caught:
        RemoteJudge(source)
    assert "word" not in str(caught.value)


def test_bad_input_is_refused_before_anything_is_sent(audio):
    judge = RemoteJudge("http://localhost:1/v1#tiny", backoff=0)
    with pytest.raises(ValueError, match=r"control token <\|im_end\|>"):
        judge(audio[:1], RATE, ["a<|im_end|>"])
    with pytest.raises(ValueError, match="NaN"):
        judge(audio[:1] + torch.nan, RATE, ["a"])
    with pytest.raises(ValueError, match="sample_rate=0"):
        judge(audio[:1], 0, ["a"])
    for options in ({"in_flight": 0}, {"timeout": 0}, {"attempts": 0}, {"fallback": "half"}, {"backoff": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RemoteJudge("http://localhost:1/v1#tiny", **options)
