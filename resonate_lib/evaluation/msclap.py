"""MS-CLAP 2023, whose cosine is TTA-Bench's CLAP score, in an environment of its own.

Its package needs transformers 4 where this suite has 5, so the two never meet: `make_environment` makes an environment that has
the few packages that differ and sees this one's for the rest (PyTorch above all), and `MsClap` hands clips to a worker in it
(`msclap_worker.py`), which runs the package's own networks.
Source: Elizalde et al. (arXiv 2309.05767); TTA-Bench (arXiv 2509.02398).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from resonate_lib import record, runs
from resonate_lib.models.pretrained import TOKENIZERS, locate, read_weights
from resonate_lib.rewards.base import RewardResult
from resonate_lib.rewards.laion import check_audio

# What differs from this environment, with nothing that these would bring along: they resolve together on Python 3.11.
PINS = ("msclap==1.3.4", "transformers==4.57.3", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
MEGABYTES = 16  # that pip fetches
VARIABLE = "RESONATE_MSCLAP_ENV"  # an environment made elsewhere, used instead
MAKE = "python -m resonate_lib doctor --msclap"
WORKER = Path(__file__).with_name("msclap_worker.py")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # the worker gets files, and asks nobody


# -------------------------------------------------------------------------------------------------- the environment
def environment() -> Path:
    """The folder of the environment, made or not: RESONATE_MSCLAP_ENV, else one in the cache, named after all it is made of."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser().resolve()
    made_of = [*PINS, *_shared(), metadata.version("torch"), platform.python_version()]
    return runs.cache_dir() / f"msclap-{record.hash8(made_of)}"


def environment_python() -> Path:
    """The environment's interpreter. FileNotFoundError, with the command that makes it, where there is none."""
    python = _python(environment())
    if not python.is_file():
        given = f", or correct {VARIABLE}" if os.environ.get(VARIABLE) else ""
        raise FileNotFoundError(f"MS-CLAP needs an environment of its own, and {python} is not there: make it with {MAKE}{given}, "
                                'or leave MS-CLAP out (-p msclap_source "")')
    return python


def make_environment() -> Path:
    """Make the environment where it is not there yet, and return its folder; progress goes to standard error.

    Made in a part folder, tried, then renamed: it is there whole or not at all. Raises ValueError in one line.
    """
    folder = environment()
    if _python(folder).is_file():
        return folder
    if os.environ.get(VARIABLE):
        raise ValueError(f"{VARIABLE}={folder}: there is no bin/python; correct it, or unset it to have one made in the cache")
    print(f"making the environment of MS-CLAP in {folder}: {len(PINS)} packages, about {MEGABYTES} MB to download, a minute",
          file=sys.stderr)  # fmt: skip
    part = _part_folder(folder.name)
    part.chmod(0o755)  # others may share the cache
    try:
        _step([sys.executable, "-m", "venv", str(part)], "python -m venv failed")
        pip = [str(_python(part)), "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20"]
        for number, pin in enumerate(PINS, 1):
            print(f"  {number} of {len(PINS)}: {pin}", file=sys.stderr, flush=True)
            _step([*pip, "install", "--no-deps", pin], f"pip could not install {pin} (is there a network?)")
        site = next(part.glob("lib/python*/site-packages"))
        (site / "resonate.pth").write_text("".join(f"{path}\n" for path in _shared()), encoding="utf-8")
        print("  trying it", file=sys.stderr, flush=True)
        _step([str(_python(part)), "-I", str(WORKER), "--check"], "the environment was made, but does not work")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return environment_python().parent.parent


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _shared() -> list[str]:
    """The folders that this interpreter has its packages in; the environment looks there for what it has not itself."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _step(command: list[str], failure: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | OFFLINE, check=False)
    if done.returncode:
        raise ValueError(f"{failure}: {_last_line(done.stderr or done.stdout)}")


def _last_line(text: str) -> str:
    """What a program said last, in one line of at most 300 characters."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def _part_folder(name: str) -> Path:
    """A new folder in the cache for what is unfinished; those of processes that were killed at it are removed."""
    mine = record.this_process()
    for left in runs.cache_dir().glob(f"*.{mine['host']}-*.part"):
        if not psutil.pid_exists(int(left.name.split(".")[1].rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}.{mine['host']}-{mine['pid']}.", suffix=".part", dir=runs.cache_dir()))


# -------------------------------------------------------------------------------------------------- the score
@dataclass
class _Worker:
    """A running worker: its process, the lines it has said, and the folder that files pass through."""

    process: subprocess.Popen
    said: queue.Queue
    folder: Path

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # it ends with its input
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class MsClap:
    """The cosine between a clip and its prompt in MS-CLAP's space, in [-1, 1], as TTA-Bench takes it; audio of any sample rate.

    Clips are resampled to 44.1 kHz, and one of less than 7 s is repeated to 7 s, as published. Of a longer one the package hears
    7 s from a random place; here the fewest windows of 7 s that, evenly spaced from its first sample to its last, hold all of it
    are heard (of 10 s the first 7 and the last 7), and the score is the mean of their cosines: the same clip gets the same
    score, and nothing is missed. An exclamation mark in a prompt is the padding's token, so that the text is read one token
    early for each, as published.

    The worker is a process of its own, closed with this object or this process. Raises ConnectionError in one line when it
    dies or is silent for `timeout` seconds; the next call starts another. ValueError for what it refuses.
    """

    def __init__(self, python: Path, weights: Path, tokenizer: Path, *, device: str = "cpu", batch_size: int = 16,
                 timeout: float = 600.0, program: Path = WORKER):  # fmt: skip
        """weights: a file as `pretrained.read_weights` takes it. tokenizer: a folder with GPT-2's config.json and tokenizer.
        program: what python runs, see `msclap_worker.py` for what it is told and answers."""
        self.command = [str(python), "-I", str(program)]
        self.weights, self.tokenizer, self.device = Path(weights), Path(tokenizer), device
        self.batch_size, self.timeout = batch_size, timeout
        self.versions: dict[str, str] = {}
        self._worker: _Worker | None = None

    @classmethod
    def load(cls, weights: str | Path, gpt2: str | Path, *, device: str | None = None, batch_size: int = 16) -> MsClap:
        """Starts a worker with the published file, whole or not at all.

        weights: the file `CLAP_weights_2023.pth`, or a directory or hub id ("microsoft/msclap") that holds it. gpt2: a folder with
        config.json and the tokenizer, or a hub id ("openai-community/gpt2"). Both as `pretrained.locate` takes them. device: "cuda"
        or "cpu", default a GPU if there is one. batch_size: clips handed over at once.
        Raises FileNotFoundError or ValueError, one line with what to do.
        """
        python, file, folder = environment_python(), locate("msclap", weights).path, locate("gpt2", gpt2).path
        has = {path.name for path in folder.iterdir()}
        if not ("tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has):
            raise FileNotFoundError(f"{folder}: {TOKENIZERS[0]} of GPT-2 is needed, found {sorted(has)}")
        made = cls(python, file, folder, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), batch_size=batch_size)
        made.start()
        return made

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: Sequence[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        audio = check_audio(audio)
        if len(prompts) != len(audio):
            raise ValueError(f"{len(audio)} clips but {len(prompts)} prompts; give one for each")
        scores: list[float] = []
        for first in range(0, len(audio), self.batch_size):
            part = slice(first, first + self.batch_size)
            scores += self._score(audio[part].cpu().numpy(), int(sample_rate), list(prompts[part]))
        return RewardResult(torch.tensor(scores).clamp(-1, 1))

    def start(self) -> None:
        """Start the worker where none runs; its versions of the packages are in `versions` then."""
        if self._worker is not None:
            return
        folder = _part_folder("msclap-worker")
        try:
            state = read_weights(self.weights)  # here, so that nothing is unpickled there
            handed = folder / "weights.safetensors"
            save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, handed)
            with open(folder / "errors.txt", "w", encoding="utf-8") as errors:
                process = subprocess.Popen(
                    [*self.command, str(handed), str(self.tokenizer), self.device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=errors, text=True, encoding="utf-8", env=os.environ | OFFLINE, start_new_session=True,
                )  # fmt: skip  # a session of its own: Ctrl-C is for this process, which closes the worker
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        said: queue.Queue = queue.Queue()
        threading.Thread(target=_listen, args=(process.stdout, said), daemon=True).start()
        self._worker = _Worker(process, said, folder)
        self._end = weakref.finalize(self, self._worker.close)  # with this object, or with this process
        try:
            self.versions = self._answer()["versions"]
        except BaseException:
            self.close()
            raise
        handed.unlink()

    def close(self) -> None:
        """End the worker; a later call starts another."""
        if self._worker is not None:
            self._worker = None
            self._end()

    def _score(self, clips: np.ndarray, sample_rate: int, prompts: list[str]) -> list[float]:
        self.start()
        place = self._worker.folder / "clips.npy"
        request = {"audio": str(place), "sample_rate": sample_rate, "prompts": prompts}
        try:
            np.save(place, clips)
            with contextlib.suppress(BrokenPipeError):  # it is dead, as the answer will tell
                self._worker.process.stdin.write(json.dumps(request) + "\n")
                self._worker.process.stdin.flush()
            scores = self._answer()["scores"]
            if len(scores) != len(prompts):
                raise ConnectionError(f"MS-CLAP's worker gave {len(scores)} scores for {len(prompts)} clips")
        except ValueError:  # refused by a worker that is well
            raise
        except BaseException:  # question and answer may no longer belong together
            self.close()
            raise
        place.unlink()
        return scores

    def _answer(self) -> dict:
        """The worker's next line."""
        try:
            line = self._worker.said.get(timeout=self.timeout)
        except queue.Empty:
            raise ConnectionError(f"MS-CLAP's worker was silent for {self.timeout:g} s and is ended; use a smaller batch_size or a "
                                  "longer timeout") from None
        answer = _parsed(line)
        if answer is None:
            code = None
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has closed its output, and still lives
                code = None if line else self._worker.process.wait(timeout=5)
            last = _last_line((self._worker.folder / "errors.txt").read_text(encoding="utf-8", errors="replace"))
            raise ConnectionError(f"MS-CLAP's worker {f'sent {line[:80]!r}' if line else f'ended with exit code {code}'}: {last}")
        if "error" in answer:
            raise ValueError(f"MS-CLAP: {answer['error']}")
        return answer


def _parsed(line: str) -> dict | None:
    """The object that a whole line of JSON is; None for anything else."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _listen(stream, said: queue.Queue) -> None:
    """Puts every line into the queue, and an empty one when there are no more."""
    with stream:
        for line in stream:
            said.put(line)
    said.put("")
