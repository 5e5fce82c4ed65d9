"""The one training loop: progress, resume and safe checkpoints for everything the suite trains.

What is trained is a `step` function; randomness comes from a generator seeded by (seed, step), so that a resumed run
repeats an uninterrupted one. Precision lives here too: bf16 compute over float32 weights where the hardware has it.
"""

import contextlib
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch

from resonate_lib.progress import EVERY, clock

CHEAP_SAVE = 1.0  # seconds; a state written faster is written as often as the caller says
SAVE_SHARE = 0.01  # of the time may go into writing a larger one
LONGEST_UNSAVED = 600.0  # seconds of training after which any state is written


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one training step: a function of (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 7919 + 12_345) % 2**63)


def has_fast_bf16(device: str = "cpu") -> bool:
    """Whether bf16 matrix products are fast on the device: a GPU, or a CPU with AMX tiles or AVX-512 BF16 (there they take
    two thirds of float32's time in training, on one thread)."""
    return device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(precision: str = "auto", device: str = "cpu"):
    """Context of the compute precision: "float32", "bf16", or "auto" (bf16 where it is fast). Weights stay float32."""
    if precision not in ("auto", "bf16", "float32"):
        raise ValueError(f"precision={precision!r}: use 'auto', 'bf16' or 'float32'")
    if precision == "float32" or (precision == "auto" and not has_fast_bf16(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, torch.bfloat16)


def fit(step, *, steps: int, modules: dict, label: str, seed: int = 0, checkpoint=None, save_every: int = 100) -> list[dict]:
    """Call step(i, generator) -> dict of numbers for i in 0..steps-1; returns the list of those dicts, each with its "step".

    modules: {name: object with state_dict and load_state_dict}, everything that changes (network, optimiser, old policy).
    checkpoint: file of the state, written atomically every `save_every` steps and after the last, and read back if it is
    there; it also holds the seconds that its steps took (`seconds_done`). Where writing takes over CHEAP_SAVE it waits until it
    is at most SAVE_SHARE of the time, or LONGEST_UNSAVED have passed; after those it is written at any step. What is trained
    does not depend on when it is. The time left is told from the mean of the last 20 steps, without the first, which may
    prepare what the others use.
    """
    history, start, before = _restore(checkpoint, modules)
    began = told = saved = time.monotonic()
    cost, lasted = 0.0, deque(maxlen=20)  # seconds of the last steps, without the first: it may hold what is made once
    for index in range(start, steps):
        started = time.monotonic()
        history.append({"step": index, **step(index, step_generator(seed, index))})
        now = time.monotonic()
        if index > start:
            lasted.append(now - started)
        done = index + 1
        if checkpoint and (done == steps or _save_is_due(done % save_every == 0, now - saved, cost)):
            save_state(checkpoint, modules, history, done, before + now - began)
            saved = time.monotonic()
            cost = saved - now
        if now - told > EVERY or done == steps:
            told = now
            numbers = "  ".join(f"{key} {value:.4g}" for key, value in list(history[-1].items())[1:6])
            left = f"  {clock(fmean(lasted or [0]) * (steps - done))} left" if lasted or done == steps else ""
            print(f"{label}: step {done}/{steps}  {numbers}{left}", flush=True)
    return history


def _save_is_due(regular: bool, since: float, cost: float) -> bool:
    """Whether to write the state after a step, `since` seconds after the last write, which took `cost` of them; `regular`: at a
    multiple of save_every."""
    return since >= LONGEST_UNSAVED or (regular and (cost < CHEAP_SAVE or cost <= SAVE_SHARE * since))


def save_state(path, modules, history, done, seconds):
    """Write the training state atomically (tensors and plain values only, so that it loads with weights_only=True)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"modules": {name: module.state_dict() for name, module in modules.items()}, "history": history, "done": done,
             "seconds": seconds}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(directory: str | Path) -> Iterator[Path]:
    """A temporary folder beside `directory` that takes its name when the block ends well, and vanishes otherwise. Its files can be
    read by everybody, also those that were written for their owner alone, as safetensors writes them."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            shutil.rmtree(directory)
        for file in temporary.rglob("*"):
            file.chmod(file.stat().st_mode | (0o555 if file.is_dir() else 0o444))
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seconds_done(path) -> float:
    """Seconds that the steps in a state file took, over all interruptions; 0 where there is no file."""
    return _load(path, mmap=True).get("seconds", 0.0)


def history_done(path) -> list[dict] | None:
    """The rows of the steps in a state file; None where there is no file."""
    return _load(path, mmap=True).get("history")


def _load(path, *, mmap=False):
    """The state in a file, on the CPU whatever device it was trained on (load_state_dict copies to its own); {} without one."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap) if path and Path(path).is_file() else {}


def _restore(path, modules):
    state = _load(path)
    if not state:
        return [], 0, 0.0
    if set(state["modules"]) != set(modules):
        raise ValueError(f"{path}: holds {', '.join(state['modules'])}, not {', '.join(modules)}: a state of other settings "
                         "or another version; delete it to start anew")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    return state["history"], state["done"], state.get("seconds", 0.0)
