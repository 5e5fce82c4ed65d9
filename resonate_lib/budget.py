"""Whether the notebooks of a profile of published weights can start on this machine: are the parts here that they use, and do
they fit its memory.

What a training needs is worked out in `memory.py`; here stands what else each notebook holds meanwhile. Sizes of models
come from their files, or from the list of published parts where they are not here yet.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resonate_lib import memory, reward_spec
from resonate_lib.config import NOTEBOOK_CONFIGS, SECTIONS
from resonate_lib.data import prompts
from resonate_lib.knobs import Config
from resonate_lib.models import pretrained
from resonate_lib.models.flux_audio import FluxAudio, fluxaudio_m_44k
from resonate_lib.models.pretrained import PARTS, beside, flux_config, locate, read_weights

TRIAL = "own reward"  # of notebook 04: one small round of GRPO, with all its networks still there
HACK = "planted hack"  # its last training: DiffRO of a reward without a model, 16 clips a round at most
# Of 08 the stages of the flow: PPO's network is a pipeline's, whose shapes are not known here.
STAGES = {"02": ("pretrain",), "03": ("dpo", "pretrain"), "04": ("grpo", "nft", TRIAL, HACK), "05": ("grpo", "diffro"),
          "08": ("grpo", "nft", "dpo")}  # fmt: skip
# Networks that a notebook holds besides that of its stage: the base, and students of earlier stages.
BESIDE = {"02 pretrain": 1, "03 dpo": 1, "03 pretrain": 2, "04 grpo": 1, "04 nft": 2, f"04 {TRIAL}": 3, f"04 {HACK}": 3}
BESIDE |= {"05 grpo": 1, "05 diffro": 2, "08 grpo": 1, "08 nft": 2, "08 dpo": 3}
SYSTEMS = {"00": 2, "06": 7, "07": 6}  # networks of the notebooks that only generate: the base and what was tuned
HEARING = {  # who hears, besides the reward lines
    "02": ("clap", "lalm", "clap_eval", "lalm_eval"),
    "04": ("clap_eval", "aesthetics", "msclap"),  # the watch, as in 05
    "05": ("clap", "lalm", "clap_eval", "lalm_eval", "aesthetics", "msclap"),
    "06": ("clap", "clap_eval", "lalm_eval", "aesthetics", "msclap"),
    "08": ("clap", "clap_eval", "aesthetics", "msclap"),
}
SCORERS = {"clap": "clap", "lalm": "qwen25_omni", "clap_eval": "clap", "lalm_eval": "qwen3_omni", "aesthetics": "aesthetics",
           "msclap": "msclap"}  # fmt: skip
QUARTERS = {"": 4, "8bit": 2, "4bit": 1}  # of bf16's size
NOT_QUANTISED = 2_500_000_000  # word embeddings and output layer of Qwen2-Audio, the largest; they stay in bf16
T5_ENCODER = 0.44  # of FLAN-T5's file: the decoder is not built
# Bytes that scorers work in for a batch of 16 clips; allowances, not measurements.
SCORING = {"clap": 1_000_000_000, "aesthetics": 1_000_000_000, "lalm": 2_000_000_000, "msclap": 0}
GRAPH = 3  # times as much for a reward whose gradient is asked for
PROCESS = 2_000_000_000  # of MS-CLAP, which has a process of its own: the driver once more, and its work
TOKENIZERS = {"clap": ("roberta", "roberta_source"), "msclap": ("gpt2", "gpt2_source")}  # {scorer: part, where it comes from}
LAYOUTS = {  # file sets, any of which is enough, where the reader asks for other files than the list of parts names
    "roberta": (("config.json", "tokenizer.json"), ("config.json", "vocab.json", "merges.txt")),
    "gpt2": (("config.json", "tokenizer.json"), ("config.json", "vocab.json", "merges.txt")),
    "aesthetics": (("config.json", "model.safetensors"), ("checkpoint.pt",)),
}


# -------------------------------------------------------------------------------------------------- memory
def plans(config: Mapping[str, Mapping[str, Any]], notebooks: list[str], parameters: Mapping[str, Mapping], device: str) -> dict:
    """{"04 grpo": rows of `memory.plan`} for every stage of the notebooks, and {"06": rows} for one that only generates.

    config: every section, resolved; parameters: what is given for single notebooks. device: "cuda" or "cpu". ValueError for a
    checkpoint that cannot be read.
    """
    found, build = {}, _network(config)
    for number in notebooks:
        given = parameters.get(number, {})
        for place, section in enumerate(STAGES.get(number, ())):
            name, stage = f"{number} {section}", _stage(config, number, section, given)
            if not stage.steps:
                continue
            held = {f"networks held beside: {BESIDE[name]}, float32": BESIDE[name] * _bytes(build)}
            judges = _judges(config, number, given, STAGES[number][: place + 1])
            held |= _published(config) | judges | (_pipeline(config) if number == "08" else {})
            clips, climbed = memory.batches(stage)[1], section in ("diffro", HACK)
            scoring = (GRAPH if section == "diffro" else 1) * _scoring(judges) if clips else 0
            decoding = memory.decoding(clips, seconds=config["suite"]["seconds"], device=device, gradients=climbed)
            rows = memory.plan(build, stage, device=device, held=held, scoring=scoring, decoding=decoding)
            found[name] = [replace(row, knobs=_advice(row.part, number)) if row.part in held else row for row in rows]
        if number in SYSTEMS:
            found[number] = _generating(config, number, given, build, device)
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


def _stage(config, number: str, section: str, given: Mapping[str, Any]) -> Config:
    """The stage's configuration with what is given for its notebook: plain names are of its main stage, `trained` of all
    (in 08, where the others are as their own notebooks have them, of PPO alone), the others' begin with the stage's name."""
    if section == TRIAL:
        return replace(_stage(config, number, "grpo", given), steps=1, prompts_per_step=2, minibatches=1)
    if section == HACK:
        own = _stage(config, number, "diffro", {})
        most = min(16, _stage(config, number, "nft", given).prompts_per_step)
        return replace(own, steps=1, prompts_per_step=most, reward="")  # loudness, which no model hears
    names, first = set(config[section]), section == NOTEBOOK_CONFIGS[number][0].section
    mine = {key: value for key, value in given.items() if key in names and (first or (key == "trained" and number != "08"))}
    mine |= {key.removeprefix(f"{section}_"): value for key, value in given.items() if key.removeprefix(f"{section}_") in names
             and key.startswith(f"{section}_")}  # fmt: skip
    values = {**config[section], **{key: value for key, value in mine.items() if value is not None}}
    return SECTIONS[section](**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _network(config) -> Callable[[], FluxAudio]:
    """What builds the network of the profile's checkpoint, or the published one where it is not here yet."""
    try:
        state = read_weights(locate("generator_pt", config["suite"]["weights"], download=False).path)
    except FileNotFoundError:
        return fluxaudio_m_44k
    length = round(config["suite"]["seconds"] * config["suite"]["sample_rate"]) // 1024
    return partial(FluxAudio, **flux_config(state), latent_seq_len=length)


def _bytes(build: Callable[[], FluxAudio]) -> int:
    with torch.device("meta"):
        return sum(tensor.nbytes for tensor in build().state_dict().values())


def _published(config) -> dict[str, int]:
    """{what: bytes} of the codec and the text encoder, which every notebook holds."""
    suite, weights = config["suite"], config["suite"]["weights"]
    return {
        "autoencoder": _part_bytes("vae_44k", suite["vae"], weights),
        "vocoder": _part_bytes("vocoder_44k", suite["vocoder"], weights),
        "text encoder": round(T5_ENCODER * _part_bytes("t5", suite["text"], weights)),
    }


def _pipeline(config) -> dict[str, int]:
    """{what: bytes} of the diffusion model that 08 starts from, in its files' precision, and of its tuned copy."""
    source = config["diffusion"]["source"]
    part = pretrained.pipeline_part(source)
    return {"diffusion pipeline and its copy, at most": 2 * _part_bytes(part, source, config["suite"]["weights"])}


def _heard(config, number: str, given: Mapping[str, Any], sections: tuple[str, ...]) -> list[str]:
    """The scorers of SCORERS that a notebook has made by the end of these stages."""
    lines = [getattr(_stage(config, number, section, given), "reward", "") for section in sections]
    lines += [given.get("reward") or "lalm"] if number == "06" else []
    lines = [given.get("reward") or config["ppo"]["reward"]] if number == "08" else lines  # one for all methods
    named = {name for line in lines if line for name in reward_spec.judges(line)} | set(HEARING.get(number, ()))
    return [name for name in SCORERS if name in named]


def _judges(config, number: str, given: Mapping[str, Any], sections: tuple[str, ...]) -> dict[str, int]:
    """{scorer: bytes} of those that a notebook holds on this device."""
    sizes = {name: _judge_bytes(config, name) for name in _heard(config, number, given, sections)}
    return {name: size for name, size in sizes.items() if size}


def _scoring(judges: Mapping[str, int]) -> int:
    return max((SCORING[name.removesuffix("_eval")] for name in judges), default=0)


def _advice(name: str, number: str) -> tuple[str, ...]:
    """What makes room where a judge is too large."""
    if name == "msclap":
        return ('msclap_source="" (left out)',)
    if not name.startswith("lalm"):
        return ()
    other = ("06.reward=clap",) if (name, number) == ("lalm", "06") else ()
    return (f"{name}_source=http://host:port/v1#model (a server)", "lalm_quantisation=4bit", "lalm_offload=true", *other)


def _part_bytes(part: str, source: str, directory: str) -> int:
    """Of its file or folder where it is here, else as the list of parts says."""
    try:
        return memory.file_bytes(locate(part, source or None, beside=directory, download=False).path)
    except FileNotFoundError:
        return round(PARTS[part].gigabytes * 1e9)


def _judge_bytes(config, name: str) -> int:
    """0 of one that is not asked for, or lives elsewhere. Of the CLAPs' text encoders only the tokenizers are files apart."""
    reward, weights = config["reward"], config["suite"]["weights"]
    source = beside(reward[f"{name}_source"], weights)
    if not source or source == "shipped" or source.startswith("http") or (name.startswith("lalm") and reward["lalm_offload"]):
        return 0
    here = Path(source).expanduser()
    size = memory.file_bytes(here) if here.exists() else _part_bytes(_part_of(name, source), source, weights)
    kept = min(size, NOT_QUANTISED)
    quarters = QUARTERS[reward["lalm_quantisation"]] if name.startswith("lalm") else 4
    return kept + (size - kept) * quarters // 4 + (PROCESS if name == "msclap" else 0)


def _part_of(name: str, source: str) -> str:
    """The key in PARTS of a scorer's source: by its hub id or its folder's name, else what stands in the published system."""
    of_kind = (part for part in PARTS.values() if source == part.hub or Path(source).name == part.folder)
    return next((part.name for part in of_kind), SCORERS[name])


def _generating(config, number: str, given: Mapping[str, Any], build, device: str) -> list[memory.Row]:
    """Rows of a notebook that only generates: all systems' networks, who hears them, and the work on one batch."""
    size = {"00": config["suite"]["preview_prompts"] + 1, "06": config["eval"]["batch_size"], "07": config["listen"]["prompts"]}
    knob = {"00": "preview_prompts", "06": "batch_size", "07": "prompts"}[number]
    clips = size[number] if given.get(knob) is None else given[knob] + (number == "00")
    use = memory.measure(build, clips=1, sample_clips=clips, sample_guidance=4.5, device=device)  # any above 1 takes as much
    judges = _judges(config, number, given, ())
    rows = [memory.Row(f"networks held: {SYSTEMS[number]}, float32", SYSTEMS[number] * use.weights)]
    rows += [memory.Row(name, size, "", _advice(name, number)) for name, size in (_published(config) | judges).items()]
    rows.append(memory.Row("driver and libraries", 0 if device == "cpu" else memory.ALLOWANCE))
    rows.append(memory.Row(f"sampling {clips} clips", use.sampling, "sampling", (f"{number}.{knob} below {clips}",)))
    decoding = memory.decoding(clips, seconds=config["suite"]["seconds"], device=device)
    rows += [memory.Row(f"decoding {clips} clips", decoding, "decoding")]
    rows += [memory.Row(f"scoring {clips} clips", _scoring(judges), "scoring")]
    return [row for row in rows if row.bytes]


# -------------------------------------------------------------------------------------------------- parts
def parts(config: Mapping[str, Mapping[str, Any]], notebooks: list[str], parameters: Mapping[str, Mapping], *,
          base: Path | None = None, trained: bool = False) -> list[str]:  # fmt: skip
    """Lines about published parts that the notebooks use and that will be downloaded; empty where all are on this machine.

    base: the folder of a base model of one's own, which is used in place of the published one; trained: whether this run makes
    it. Raises ValueError, one line, for the first part that is neither here nor will be downloaded, TTA-Bench's files included.
    """
    lines = []
    for part, source in _used(config, notebooks, parameters, base, trained):
        try:
            _find(part, source, config["suite"]["weights"])
        except FileNotFoundError as error:
            hub = source and not Path(source).expanduser().exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/.+)?", source)
            if not hub or pretrained.offline():
                raise ValueError(str(error)) from None
            of_list = source.startswith(PARTS[part].hub)
            size = f"about {PARTS[part].gigabytes:g} GB, {PARTS[part].licence}" if of_list else "its size is not known"
            lines.append(f"not here yet and will be downloaded: {PARTS[part].what}, {source} ({size})")
    if config["reward"]["msclap_source"] and any("msclap" in HEARING.get(number, ()) for number in notebooks):
        _check_msclap()
    bench = parameters.get("06", {}).get("tta_bench") or config["eval"]["tta_bench"]
    if "06" in notebooks and bench:
        _check_bench(bench)
    return list(dict.fromkeys(lines))


def _used(config, notebooks, parameters, base: Path | None, trained: bool) -> Iterator[tuple[str, str]]:
    """(key in PARTS, source) of all that the notebooks read."""
    suite, reward = config["suite"], config["reward"]
    if set(notebooks) <= {"01"}:
        return
    if "08" in notebooks and config["diffusion"]["source"]:
        yield pretrained.pipeline_part(config["diffusion"]["source"]), beside(config["diffusion"]["source"], suite["weights"])
    if not base and not trained:
        yield "generator_pt", suite["weights"]
    saved = _saved(base) if base and not Path(suite["weights"]).expanduser().is_dir() else {}
    for part, source in (("vae_44k", suite["vae"]), ("vocoder_44k", suite["vocoder"]), ("t5", suite["text"])):
        if source or not Path(saved.get(part, {}).get("path", "/absent")).exists():
            yield part, source
    heard = {name for number in notebooks
             for name in _heard(config, number, parameters.get(number, {}), STAGES.get(number, ()))}  # fmt: skip
    for name in (name for name in SCORERS if name in heard):
        source = reward[f"{name}_source"]
        if not source or source == "shipped" or source.startswith("http") or (Path(source) / "model_card.json").is_file():
            continue
        yield _part_of(name, source), beside(source, suite["weights"])
        if name.removesuffix("_eval") in TOKENIZERS:
            tokenizer, place = TOKENIZERS[name.removesuffix("_eval")]
            yield tokenizer, beside(reward[place], suite["weights"])


def _saved(base: Path) -> dict[str, dict]:
    """Where the parts lay that a base model was saved around."""
    facts = base / "generator.json"
    return json.loads(facts.read_text()).get("parts", {}) if facts.is_file() else {}


def _find(part: str, source: str, directory: str) -> None:
    """FileNotFoundError where a part is not on this machine."""
    path = Path(source).expanduser()
    if part not in LAYOUTS or path.is_file():
        locate(part, source or None, beside=directory, download=False)
        return
    from huggingface_hub import try_to_load_from_cache

    def has(name: str) -> bool:
        return (path / name).is_file() if path.is_dir() else isinstance(try_to_load_from_cache(source, name), str)

    if not any(all(map(has, names)) for names in LAYOUTS[part]):
        wanted = ", or ".join(" and ".join(names) for names in LAYOUTS[part])
        raise FileNotFoundError(f"{PARTS[part].what} is not in {source}{'' if path.is_dir() else ' on this machine'}: it needs "
                                f"{wanted}; get them from https://huggingface.co/{PARTS[part].hub} and name their folder")


def _check_msclap() -> None:
    """ValueError where MS-CLAP's environment is not made."""
    from resonate_lib.evaluation import msclap

    try:
        msclap.environment_python()
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def _check_bench(folder: str) -> None:
    """ValueError for files of TTA-Bench that are absent or damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notebook 06 tells what is odd in them
        for part in prompts.TTA_BENCH_FILES:
            try:
                prompts.load_tta_bench(folder, part)
            except FileNotFoundError as error:
                raise ValueError(str(error)) from None
