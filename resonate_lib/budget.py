"""Whether the notebooks of a profile of published weights fit this machine: a memory plan of each, before anything starts.

What a training needs is worked out in `memory.py`; here stands what else each notebook holds meanwhile. Sizes of models
come from their files, or from the list of published parts where they are not here yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from resonate_lib import memory
from resonate_lib.config import SECTIONS, Config
from resonate_lib.models.flux_audio import FluxAudio, fluxaudio_m_44k
from resonate_lib.models.pretrained import PARTS, beside, flux_config, locate, read_weights

SYSTEMS = 6  # networks that notebooks 06 and 07 hold: base, trained on, DPO, two of GRPO, NFT
STAGES = {"02": ("pretrain",), "03": ("dpo", "pretrain"), "04": ("grpo", "nft"), "05": ("grpo",), "06": (), "07": ()}
HEARING = {  # reward models a notebook holds besides those of its stages' reward lines
    "02": ("clap", "lalm", "clap_eval", "lalm_eval"),
    "05": ("clap", "lalm"),
    "06": ("clap", "lalm", "clap_eval", "lalm_eval"),
}
QUARTERS = {"": 4, "8bit": 2, "4bit": 1}  # of bf16's size


def plans(config: Mapping[str, Mapping[str, Any]], notebooks: list[str], parameters: Mapping[str, Mapping], device: str) -> dict:
    """{"04 grpo": rows of `memory.plan`} for every stage of the notebooks. config: every section, resolved; parameters: what is
    given for single notebooks. device: "cuda" or "cpu"."""
    found = {}
    for number in notebooks:
        for section in STAGES.get(number, ()):
            stage = _stage(config, section, parameters.get(number, {}))
            held = _held(config, number, getattr(stage, "reward", ""))
            rows = memory.plan(partial(_network, config), stage, device=device, held=held)
            found[f"{number} {section}"] = [replace(row, knobs=_advice(row.part)) if row.part in held else row for row in rows]
        if number in ("06", "07"):
            found[number] = _evaluation(config, number, device)
    return found


def report(config, notebooks: list[str], parameters, device: str, free: int) -> str:
    """The tables of all `plans`, to be printed. Raises ValueError, one line, where one does not fit in `free` bytes."""
    text = []
    for name, rows in plans(config, notebooks, parameters, device).items():
        try:
            memory.check(rows, free)
        except MemoryError as error:
            raise ValueError(f"notebook {name} does not fit on this {'GPU' if device == 'cuda' else 'machine'}: {error}") from None
        text.append(f"memory, notebook {name}\n{memory.table(rows, free)}")
    return "\n\n".join(text)


def _stage(config, section: str, given: Mapping[str, Any]) -> Config:
    """The stage's configuration with what is given for its notebook under its names."""
    cls = SECTIONS[section]
    names = set(config[section])
    mine = {key: value for key, value in given.items() if key in names and not (section == "nft" and f"nft_{key}" not in given)}
    mine |= {key.removeprefix(f"{section}_"): value for key, value in given.items() if key.removeprefix(f"{section}_") in names}
    values = {**config[section], **{key: value for key, value in mine.items() if value is not None}}
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _network(config) -> FluxAudio:
    """The network of the profile's checkpoint, or the published one where it is not here yet."""
    try:
        state = read_weights(locate("generator_pt", config["suite"]["weights"], download=False).path)
    except (FileNotFoundError, ValueError):
        return fluxaudio_m_44k()
    length = round(config["suite"]["seconds"] * config["suite"]["sample_rate"]) // 1024
    return FluxAudio(**flux_config(state), latent_seq_len=length)


def _held(config, number: str, reward: str) -> dict[str, int]:
    """{what: bytes} on the device throughout a notebook, the network of its stage apart."""
    suite = config["suite"]
    parts = {
        "autoencoder": ("vae_44k", suite["vae"]),
        "vocoder": ("vocoder_44k", suite["vocoder"]),
        "text encoder": ("t5", suite["text"]),
    }
    held = {name: _part_bytes(part, source or None, suite["weights"]) for name, (part, source) in parts.items()}
    named = {term.rpartition("*")[2].strip() for term in reward.split("+")} | set(HEARING.get(number, ()))
    for name in ("clap", "lalm", "clap_eval", "lalm_eval"):
        size = _judge_bytes(config["reward"], name, suite["weights"]) if name in named else 0
        if size:
            held[name] = size
    return held


def _advice(name: str) -> tuple[str, ...]:
    """What makes room where a judge is too large."""
    if not name.startswith("lalm"):
        return ()
    return (f"{name}_source=http://host:port/v1#model (a server)", "lalm_quantisation=4bit", "lalm_offload=true")


def _part_bytes(part: str, source: str | None, beside: str) -> int:
    try:
        return memory.file_bytes(locate(part, source, beside=beside, download=False).path)
    except (FileNotFoundError, ValueError):
        return round(PARTS[part].gigabytes * 1e9)


def _judge_bytes(reward: Mapping[str, Any], name: str, weights: str) -> int:
    source = beside(reward[f"{name}_source"], weights)
    if not source or source == "shipped" or source.startswith("http") or (name.startswith("lalm") and reward["lalm_offload"]):
        return 0
    if Path(source).expanduser().exists():
        size = memory.file_bytes(Path(source).expanduser())
    else:
        size = next((round(part.gigabytes * 1e9) for part in PARTS.values() if part.hub == source), 0)
    return size * QUARTERS[reward["lalm_quantisation"]] // 4 if name.startswith("lalm") else size


def _evaluation(config, number: str, device: str) -> list[memory.Row]:
    """Rows of a notebook that only generates: all systems' networks, who hears them, and the sampling of one batch."""
    clips = config["eval"]["batch_size"] if number == "06" else config["listen"]["prompts"]
    use = memory.measure(partial(_network, config), clips=1, sample_clips=clips, sample_guidance=4.5, device=device)
    held = _held(config, number, "lalm" if number == "06" else "")
    rows = [memory.Row(f"{SYSTEMS} networks, float32", SYSTEMS * use.weights)]
    rows += [memory.Row(name, size, "", _advice(name)) for name, size in held.items()]
    knob = "06 batch_size" if number == "06" else "07 prompts"
    return [*rows, memory.Row(f"sampling {clips} clips", use.sampling, "sampling", (f"{knob} below {clips}",))]
