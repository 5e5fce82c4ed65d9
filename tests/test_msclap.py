"""MS-CLAP in its own environment: the client against a stub worker, how the environment is made, and, where it is there
(RESONATE_MSCLAP_ENV, or made by `doctor --msclap`), the real package on a miniature against its own functions."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import soundfile
import torch

from resonate_lib import __main__ as cli
from resonate_lib import budget, config, doctor, record, runs
from resonate_lib.evaluation import msclap, msclap_worker, ttabench, worlds
from resonate_lib.evaluation.msclap import MsClap
from resonate_lib.rewards.base import RewardResult

HERE = Path(__file__).parent
PROMPTS = ["a bell", "rain falls", "a dog", "a cat meows twice", "wind"]
CLIPS = torch.linspace(-0.5, 0.5, 5)[:, None] * torch.ones(5, 800)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; an environment that the machine has is not looked at."""
    monkeypatch.setenv("RESONATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(msclap.VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def stub(tmp_path):
    """stub(**settings) -> the client with the stub worker, whose scores are mean of the clip x letters of the prompt x 1/8."""
    made = []

    def make(names=("scale",), **settings):
        torch.save({"model": {name: torch.tensor(0.125) for name in names}, "epoch": 3}, tmp_path / "weights.pth")
        made.append(MsClap(Path(sys.executable), tmp_path / "weights.pth", tmp_path, program=HERE / "stub_msclap.py", **settings))
        return made[-1]

    yield make
    for client in made:
        client.close()


def by_hand(clips, prompts):
    return torch.tensor([clip.mean().item() * len(prompt) / 8 for clip, prompt in zip(clips, prompts, strict=True)])


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------- the client
def test_scores_come_back_in_order_from_one_worker_that_leaves_nothing(stub, cache):
    client = stub(batch_size=2)
    result = client(CLIPS, 16000, PROMPTS)
    assert result.scores.dtype == torch.float32 and torch.allclose(result.scores, by_hand(CLIPS, PROMPTS))
    worker = psutil.Process(int(client.versions["pid"]))
    again = client(CLIPS.flip(0), 16000, PROMPTS).scores
    assert torch.allclose(again, by_hand(CLIPS.flip(0), PROMPTS)) and int(client.versions["pid"]) == worker.pid
    (folder,) = cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ["errors.txt"]  # neither weights nor clips stay
    client.close()
    assert not worker.is_running() and not list(cache.iterdir())
    assert client(CLIPS[:1], 16000, PROMPTS[:1]).scores.shape == (1,) and int(client.versions["pid"]) != worker.pid


def test_what_is_no_clip_with_its_prompt_is_refused_before(stub):
    client = stub()
    for clips, prompts, words in ((CLIPS, PROMPTS[:2], "5 clips but 2 prompts"), (CLIPS[0], PROMPTS, "has shape"),
                                  (CLIPS / 0, PROMPTS, "NaN or infinite")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            client(clips, 16000, prompts)
    assert client.versions == {}  # nothing was started for it


def test_rows_of_the_benchmark_have_the_column(stub):
    records = [{"id": f"p{i}", "prompt_text": text} for i, text in enumerate(PROMPTS)]
    rows = ttabench.score_clips(CLIPS, records, {"ms_clap": stub()}, sample_rate=16000)
    assert list(rows.columns) == [*ttabench.COLUMNS, "ms_clap"]
    assert torch.allclose(torch.tensor(rows["ms_clap"].to_numpy()).float(), by_hand(CLIPS, PROMPTS))


def test_a_worker_that_dies_is_one_line_and_the_next_call_starts_another(stub, cache):
    client = stub()
    with pytest.raises(ConnectionError) as caught:
        client(CLIPS, 16000, ["die", *PROMPTS[1:]])
    assert one_line(caught) == "MS-CLAP's worker ended with exit code 3: CUDA error: out of memory"
    assert not list(cache.iterdir())
    assert torch.allclose(client(CLIPS, 16000, PROMPTS).scores, by_hand(CLIPS, PROMPTS))
    psutil.Process(int(client.versions["pid"])).kill()
    with pytest.raises(ConnectionError, match="ended with exit code -9: it said nothing"):
        client(CLIPS, 16000, PROMPTS)


def test_a_silent_worker_is_ended(stub, cache):
    client = stub()
    client.start()
    client.timeout, worker = 0.2, psutil.Process(int(client.versions["pid"]))
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"silent for 0.2 s and is ended"):
        client(CLIPS, 16000, ["sleep", *PROMPTS[1:]])
    assert time.monotonic() - began < 10 and not worker.is_running() and not list(cache.iterdir())


@pytest.mark.parametrize(("what", "error", "words"), [
    ("refuse", ValueError, "MS-CLAP: a prompt of 2000 tokens"),
    ("few", ConnectionError, "MS-CLAP's worker gave 4 scores for 5 clips"),
    ("junk", ConnectionError, "MS-CLAP's worker sent '7"),
])  # fmt: skip
def test_an_answer_of_another_kind_is_one_line(stub, what, error, words):
    client = stub()
    with pytest.raises(error) as caught:
        client(CLIPS, 16000, [what, *PROMPTS[1:]])
    assert one_line(caught).startswith(words)
    before = client.versions["pid"]
    assert torch.allclose(client(CLIPS, 16000, PROMPTS).scores, by_hand(CLIPS, PROMPTS))
    assert (client.versions["pid"] == before) is (error is ValueError)  # who refuses is well, and stays


def test_a_worker_that_cannot_start_leaves_nothing(stub, cache, tmp_path):
    with pytest.raises(ValueError, match=r"^MS-CLAP: the weights are not those of MS-CLAP 2023$"):
        stub(names=("broken",)).start()
    client = stub()
    (tmp_path / "weights.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="a web page, not weights"):
        client.start()
    client = stub()
    client.command[-1] = str(tmp_path / "absent.py")
    with pytest.raises(ConnectionError, match=r"ended with exit code 2: .*absent.py.*No such file"):
        client.start()
    assert not list(cache.iterdir())


def test_an_interrupted_question_is_not_answered_later(stub, monkeypatch):
    client = stub()
    client.start()
    before = client.versions["pid"]
    with monkeypatch.context() as patch:
        patch.setattr(client._worker.said, "get", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client(CLIPS, 16000, PROMPTS)
    assert torch.allclose(client(CLIPS.flip(0), 16000, PROMPTS).scores, by_hand(CLIPS.flip(0), PROMPTS))
    assert client.versions["pid"] != before


def test_the_worker_ends_with_the_program_that_started_it(stub, cache, tmp_path):
    """By leaving, and by being killed; what the killed one left is removed by the next."""
    stub()
    text = """
import sys, os
from pathlib import Path
from resonate_lib.evaluation.msclap import MsClap
how, weights, stub = sys.argv[1:]
client = MsClap(Path(sys.executable), Path(weights), Path("."), program=Path(stub))
client.start()
print(client.versions["pid"], flush=True)
if how == "killed":
    os.kill(os.getpid(), 9)
"""
    for how, left in (("leaves", 0), ("killed", 1)):
        done = subprocess.run(
            [sys.executable, "-c", text, how, tmp_path / "weights.pth", HERE / "stub_msclap.py"], capture_output=True, text=True,
            timeout=120, env={**os.environ, "PYTHONPATH": str(HERE.parent)})  # fmt: skip
        worker, until = int(done.stdout), time.monotonic() + 10
        while psutil.pid_exists(worker) and time.monotonic() < until:
            time.sleep(0.05)
        assert not psutil.pid_exists(worker) and len(list(cache.iterdir())) == left
    client = stub()
    client.start()
    assert [path.name.split("-")[-1].split(".")[0] for path in cache.iterdir()] == [str(os.getpid())]


# -------------------------------------------------------------------------------------------------- the worker's arithmetic
def test_windows_by_hand():
    clip = torch.arange(10.0)[None]
    assert msclap_worker.windows(clip, 10)[0].tolist() == [list(range(10))]
    assert msclap_worker.windows(clip[:, :4], 10)[0].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]  # repeated, then cut
    assert msclap_worker.windows(clip, 7)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9]]
    assert msclap_worker.windows(clip, 4)[0, :, 0].tolist() == [0, 3, 6]
    for samples in range(1, 11):
        found = msclap_worker.windows(clip, samples)
        assert set(found.flatten().tolist()) == set(range(10)) and found.shape[1] == -(-10 // samples)  # as few as hold all


# -------------------------------------------------------------------------------------------------- the environment
def fake_step(fails=""):
    """Stands in for `venv` and `pip`; the step whose command has `fails` in it is refused."""
    done = []

    def step(command, failure):
        done.append(command)
        if fails and any(fails in word for word in command):
            raise ValueError(f"{failure}: ERROR: no")
        if "venv" in command:
            (Path(command[-1]) / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
            (Path(command[-1]) / "bin").mkdir()
            (Path(command[-1]) / "bin" / "python").write_text("")

    return step, done


def test_the_environment_is_made_once_and_whole(cache, monkeypatch, capsys):
    step, done = fake_step()
    monkeypatch.setattr(msclap, "_step", step)
    folder = msclap.make_environment()
    assert folder.parent == cache and [path.name for path in cache.iterdir()] == [folder.name]
    shared = (folder / "lib" / "python3.11" / "site-packages" / "resonate.pth").read_text().split()
    assert any((Path(path) / "torch").is_dir() for path in shared)
    assert [command[-1] for command in done[1:-1]] == list(msclap.PINS) and all("==" in pin for pin in msclap.PINS)
    said = capsys.readouterr().err
    assert "MB to download" in said and f"{len(msclap.PINS)} of {len(msclap.PINS)}: {msclap.PINS[-1]}" in said
    count = len(done)
    assert msclap.make_environment() == folder and len(done) == count
    assert msclap.environment_python() == folder / "bin" / "python" and doctor.checks()[-1].state == "ok"
    monkeypatch.setattr(msclap, "PINS", (*msclap.PINS, "more==1"))
    assert msclap.environment() != folder  # other packages are another environment


@pytest.mark.parametrize("fails", ["venv", "msclap==", "--check"])
def test_a_failed_environment_leaves_nothing(cache, monkeypatch, fails):
    monkeypatch.setattr(msclap, "_step", fake_step(fails)[0])
    mine = record.this_process()["host"]
    for name in (f"msclap-12345678.{mine}-4194999.abc.part", f"msclap-12345678.{mine}-{os.getppid()}.abc.part",
                 "msclap-12345678.00000000-4194999.abc.part"):  # of a dead process, of a living one, of another machine
        (cache / name / "lib").mkdir(parents=True)
    with pytest.raises(ValueError, match="ERROR: no") as caught:
        msclap.make_environment()
    one_line(caught)
    assert len(list(cache.iterdir())) == 2 and not any("4194999.abc" in path.name and mine in path.name for path in cache.iterdir())


def test_the_command_line_says_what_is_wrong_in_one_line(cache, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(msclap.VARIABLE, str(tmp_path / "absent"))
    assert cli.main(["doctor", "--msclap"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "there is no bin/python" in err
    monkeypatch.delenv(msclap.VARIABLE)
    monkeypatch.setattr(msclap, "_step", fake_step()[0])
    assert cli.main(["doctor", "--msclap"]) == 0 and capsys.readouterr().out.strip() == str(msclap.environment())


@pytest.mark.slow
def test_without_an_index_pips_last_line_is_told(cache, monkeypatch):
    """The real venv and the real pip, sent to a closed door."""
    closed = {"INDEX_URL": "http://127.0.0.1:9/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": "", "NO_CACHE_DIR": "1"}
    for name, value in (closed | {"CONFIG_FILE": os.devnull}).items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(ValueError, match=r"^pip could not install msclap==1.3.4 \(is there a network\?\): ERROR: ") as caught:
        msclap.make_environment()
    assert one_line(caught) and not list(cache.iterdir())


# -------------------------------------------------------------------------------------------------- the parts
@pytest.fixture
def made(tmp_path, monkeypatch):
    """An environment that is there, and an empty hub cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv(msclap.VARIABLE, str(tmp_path / "env"))


def test_missing_parts_say_where_they_are_to_be_had(tmp_path, made, monkeypatch):
    weights = tmp_path / "weights"
    weights.mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        MsClap.load(weights, weights)
    said = one_line(caught)
    for words in ("CLAP_weights_2023.pth is missing", "huggingface.co/microsoft/msclap/resolve/main/", "0.7 GB, MIT",
                  f"put it at {weights / 'CLAP_weights_2023.pth'}"):  # fmt: skip
        assert words in said
    (weights / "CLAP_weights_2023.pth").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"^tokenizer of MS-CLAP is not in .*config.json is missing; get it from .*gpt2 "):
        MsClap.load(weights, weights)
    for name in ("config.json", "vocab.json"):
        (weights / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json of GPT-2 is needed, found .*vocab.json"):
        MsClap.load(weights, weights)
    monkeypatch.delenv(msclap.VARIABLE)
    with pytest.raises(FileNotFoundError, match=r"an environment of its own, .*python -m resonate_lib doctor --msclap"):
        MsClap.load(weights, weights)


def test_a_run_is_refused_before_it_starts(tmp_path, made, monkeypatch):
    """Of profiles that name it, the notebooks need it that evaluate (06, 08) or watch a training (04, 05)."""
    settings = {"suite": {"weights": str(tmp_path)}, "eval": {"tta_bench": ""},
                "reward": config.RewardConfig(clap_source="", lalm_source="", clap_eval_source="", lalm_eval_source="",
                                              msclap_source="microsoft/msclap").__dict__}  # fmt: skip
    monkeypatch.setattr(budget, "_used", lambda *_: iter(()))
    assert budget.parts(settings, ["06"], {}) == []
    monkeypatch.delenv(msclap.VARIABLE)
    for number in ("04", "05", "06", "08"):
        with pytest.raises(ValueError, match="doctor --msclap"):
            budget.parts(settings, [number], {})
    assert budget.parts(settings, ["02", "03", "07"], {}) == []
    for profile in ("paper", "small"):
        assert config.resolve_all(profile)["reward"]["msclap_source"] == "microsoft/msclap"


def test_a_run_opens_it_once_and_notes_what_it_is(tmp_path, monkeypatch):
    run = runs.Run(path=tmp_path / "run", profile="tiny", seed=0, notebook="06")
    monkeypatch.setenv("RESONATE_PARAMS", str(tmp_path))
    (tmp_path / "tiny.yaml").write_text("{}")
    assert run.ms_clap() is None
    weights = tmp_path / "weights" / "CLAP_weights_2023.pth"
    weights.parent.mkdir()
    for path in (weights, *(weights.parent / "gpt2" / name for name in ("config.json", "tokenizer.json"))):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (tmp_path / "tiny.yaml").write_text(json.dumps({"reward": {"msclap_source": str(weights.parent),
                                                               "gpt2_source": str(weights.parent)}}))  # fmt: skip
    opened = []

    def load(source, gpt2):
        opened.append((source, gpt2))
        made = MsClap(Path(sys.executable), weights, weights.parent)
        made.versions = {"msclap": "1.3.4"}
        return made

    monkeypatch.setattr(MsClap, "load", load)
    assert run.ms_clap() is run.ms_clap() and opened == [(str(weights.parent), str(weights.parent))]
    notes = json.loads((run.path / "notes" / "06.json").read_text())
    assert set(notes["inputs"]["msclap"]["sha256"]) == {weights.name} and set(notes["inputs"]["gpt2"]["sha256"]) == {
        "config.json", "tokenizer.json"} and notes["msclap_packages"] == {"msclap": "1.3.4"}  # fmt: skip

    class Other:
        profile = "tiny"

        def __getattr__(self, name):
            return lambda *_, **__: run.ms_clap() if name == "ms_clap" else None

    class World:
        def judge(self, run):
            return {}

    assert worlds.scorers(World(), Other(), "clap") == {"ms_clap": run.ms_clap()}


# -------------------------------------------------------------------------------------------------- the real package
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(python, folder of the miniature, its GPT-2); skips where the environment is absent."""
    given = os.environ.get(msclap.VARIABLE)
    python = Path(given) / "bin" / "python" if given else msclap.environment() / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment of MS-CLAP: {msclap.MAKE}, or set {msclap.VARIABLE}")
    folder = tmp_path_factory.mktemp("msclap")
    return python, folder, folder / json.loads(script(python, "make", folder))


def script(python: Path, what: str, folder: Path) -> str:
    done = subprocess.run([python, "-I", HERE / "miniature_msclap.py", what, folder], capture_output=True, text=True, timeout=600,
                          env={**os.environ, **msclap.OFFLINE})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def sounds(count: int, seconds: float, rate: int) -> torch.Tensor:
    """Chirps with noise (count, samples), each its own."""
    generator = torch.Generator().manual_seed(5)
    t = torch.arange(round(seconds * rate)) / rate
    chirps = torch.stack([torch.sin(6.283 * (200 * (k + 1) * t + 60 * k * t * t)) for k in range(count)])
    return 0.2 * chirps + 0.02 * torch.randn(chirps.shape, generator=generator)


@pytest.mark.slow
def test_equals_the_packages_own_functions(real):
    """One file and one prompt at a time, as in TTA-Bench's tool, with the package's random place set to each window's; the third
    prompt has exclamation marks, the fourth more than 77 tokens."""
    python, folder, gpt2 = real
    prompts, asked = ["a dog", "rain, then a bell", "'Tag!' and a cat!", "a dog barks and " * 12], []
    lengths = {(3.0, 16000): [0], (7.0, 44100): [0], (10.0, 44100): [0, 132300], (15.5, 22050): [0, 187425, 374850]}
    for (seconds, rate), starts in lengths.items():
        for number, (clip, prompt) in enumerate(zip(sounds(4, seconds, rate), prompts, strict=True)):
            path = folder / f"{seconds}_{number}.wav"
            soundfile.write(path, clip.numpy(), rate, subtype="FLOAT")
            asked += [{"path": str(path), "prompt": prompt, "start": start} for start in starts]
    (folder / "asked.json").write_text(json.dumps(asked))
    direct = torch.tensor(json.loads(script(python, "direct", folder))).split([4 * len(starts) for starts in lengths.values()])
    client = MsClap(python, folder / "CLAP_weights_2023.pth", gpt2)
    for ((seconds, rate), starts), one_by_one in zip(lengths.items(), direct, strict=True):
        want, clips = one_by_one.view(4, len(starts)).mean(1), sounds(4, seconds, rate)
        together = client(clips, rate, prompts).scores
        alone = torch.cat([client(clips[i : i + 1], rate, prompts[i : i + 1]).scores for i in range(4)])
        off, apart = (together - want).abs().max(), (together - alone).abs().max()
        print(f"{seconds} s: {together.numpy()}, from the package {off:.1e}, together from alone {apart:.1e}")
        assert off < 1e-5 and apart < 1e-5 and want.std() > 1e-3  # the clips do differ
    client.close()


@pytest.mark.slow
def test_weights_of_another_kind_are_refused(real, tmp_path):
    python, folder, gpt2 = real
    state = torch.load(folder / "CLAP_weights_2023.pth", weights_only=True)["model"]
    name = random.Random(0).choice([name for name in state if name.endswith("linear1.weight")])
    more, cut = {"more": state[name]}, {name: state[name][:2].clone()}
    changes = (({name: None}, f"1 missing ['{name}'], 0 unexpected"), (more, "0 missing [], 1 unexpected ['more']"),
               (cut, "do not fit MS-CLAP 2023"))  # fmt: skip
    for change, words in changes:
        torch.save({"model": {key: tensor for key, tensor in (state | change).items() if tensor is not None}}, tmp_path / "w.pth")
        with pytest.raises(ValueError) as caught:
            MsClap(python, tmp_path / "w.pth", gpt2).start()
        assert words in one_line(caught)


@pytest.mark.slow
def test_rows_of_the_benchmark_from_the_published_names(real, monkeypatch, tmp_path):
    """Files found by their names in a directory, as a user puts them there."""
    python, folder, gpt2 = real
    monkeypatch.setenv(msclap.VARIABLE, str(python.parent.parent))
    client = MsClap.load(folder, gpt2, device="cpu")
    clips, records = sounds(2, 4.0, 16000), [{"id": f"p{i}", "prompt_text": text} for i, text in enumerate(PROMPTS[:2])]
    rows = ttabench.score_clips(clips, records, {"ms_clap": client}, sample_rate=16000)
    result = client(clips, 16000, PROMPTS[:2])
    assert isinstance(result, RewardResult) and rows["ms_clap"].tolist() == pytest.approx(result.scores.tolist(), abs=1e-6)
    assert client.versions["msclap"] == "1.3.4" and client.versions["transformers"].startswith("4.")
    client.close()
