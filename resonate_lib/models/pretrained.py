"""Where published weights come from: the list of parts, finding one, reading its file safely, loading it strictly.

A file is never allowed to run code: safetensors, or `torch.load(weights_only=True)`. The network is only used for a hub id
that the user named. What the tensors mean is the business of the models.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from resonate_lib.models.layers import gated_width

TIMEOUT = 10  # seconds that a server may take to answer
FOLDER_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")  # of a hub repository that is used as a folder
PIPELINE_FILES = ("model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/model.safetensors",
                  "*/diffusion_pytorch_model.safetensors", "*/*-of-*.safetensors")  # of a diffusers pipeline, without half copies
PIPELINES = {"AudioLDMPipeline": "audioldm", "AudioLDM2Pipeline": "audioldm2", "StableAudioPipeline": "stable_audio"}  # class: part
TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.json")
NESTS = ("generator", "state_dict", "model", "weights")  # keys under which real files hold their tensors
STRAY = ("t_embed.freqs", "latent_rot", "text_rot", "_latent_rot_buffer", "_text_rot_buffer")
# Training notes beside the tensors: NumPy numbers (newer and older name of their maker), the command line.
NOTES = [np.core.multiarray.scalar, (np.core.multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType,
         np.dtypes.Float32DType, np.dtypes.Int64DType, argparse.Namespace]  # fmt: skip
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Part:
    """A published model. file: in the hub repository, empty where the whole repository is the model; beside: read with it;
    weightless: of the repository only configuration and tokenizer are; pipeline: of diffusers, a folder of model folders."""

    name: str
    what: str
    hub: str
    file: str
    gigabytes: float
    licence: str
    beside: tuple[str, ...] = ()
    weightless: bool = False
    pipeline: bool = False

    @property
    def index(self) -> str:
        """The file by which its folder is known."""
        return "model_index.json" if self.pipeline else "config.json"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Of the files in its folder that are read."""
        files = PIPELINE_FILES if self.pipeline else FOLDER_FILES
        return tuple(pattern for pattern in files if not (self.weightless and pattern == "*.safetensors"))

    @property
    def url(self) -> str:
        """Of the file to download, or of the repository whose files make the folder."""
        return f"https://huggingface.co/{self.hub}" + (f"/resolve/main/{self.file}" if self.file else "")

    @property
    def folder(self) -> str:
        """The name of its own folder inside a directory of weights; a single file may also lie in the directory itself."""
        return self.hub.rpartition("/")[2]

    @property
    def place(self) -> str:
        """Where it is to be put inside a directory of weights; a file whose name many models share, in its own folder."""
        name = Path(self.file).name
        return f"{self.folder}/{name}" if name == "model.safetensors" else name or self.folder


# File names of vocoders, the CLAPs and aesthetics, sizes, the licences of MMAudio's and Qwen3's weights, and all about the
# pipelines are from general knowledge: any of them is replaced by naming a file, or `owner/repository/file`.
PARTS = {part.name: part for part in (
    Part("generator_pt", "pre-trained generator", "AndreasXi/Resonate", "Resonate_PT.pth", 1.9, "MIT"),
    Part("generator_grpo", "final generator (GRPO)", "AndreasXi/Resonate", "Resonate_GRPO.pth", 1.9, "MIT"),
    Part("vae_44k", "VAE, 44.1 kHz", "hkchengrex/MMAudio", "ext_weights/v1-44.pth", 1.2, "MIT"),
    Part("vae_16k", "VAE, 16 kHz", "hkchengrex/MMAudio", "ext_weights/v1-16.pth", 0.7, "MIT"),
    Part("vocoder_44k", "BigVGAN v2, 44.1 kHz", "nvidia/bigvgan_v2_44khz_128band_512x", "bigvgan_generator.pt", 0.5, "MIT",
         ("config.json",)),
    Part("vocoder_16k", "BigVGAN, 16 kHz", "hkchengrex/MMAudio", "ext_weights/best_netG.pt", 0.4, "MIT"),
    Part("t5", "text encoder FLAN-T5-large", "google/flan-t5-large", "", 3.1, "Apache-2.0"),
    Part("clap", "LAION-CLAP checkpoint (reward)", "lukewys/laion_clap", "music_speech_audioset_epoch_15_esc_89.98.pt", 2.4,
         "CC0-1.0"),
    Part("roberta", "tokenizer of LAION-CLAP", "roberta-base", "", 0.01, "MIT", weightless=True),
    Part("qwen25_omni", "LALM judge (reward)", "Qwen/Qwen2.5-Omni-7B", "", 22.4, "Apache-2.0"),
    Part("qwen2_audio", "LALM judge (reward, smaller)", "Qwen/Qwen2-Audio-7B-Instruct", "", 16.8, "Apache-2.0"),
    Part("qwen3_omni", "LALM judge (evaluation)", "Qwen/Qwen3-Omni-30B-A3B-Instruct", "", 70.5, "Apache-2.0"),
    Part("aesthetics", "AudioBox-Aesthetics (evaluation)", "facebook/audiobox-aesthetics", "model.safetensors", 0.4, "CC-BY-4.0",
         ("config.json",)),
    Part("msclap", "MS-CLAP 2023 (evaluation)", "microsoft/msclap", "CLAP_weights_2023.pth", 0.7, "MIT"),
    Part("gpt2", "tokenizer of MS-CLAP", "openai-community/gpt2", "", 0.01, "MIT", weightless=True),
    Part("audioldm", "AudioLDM (diffusion, 16 kHz)", "cvssp/audioldm-s-full-v2", "", 1.7, "CC-BY-NC-SA-4.0", pipeline=True),
    Part("audioldm2", "AudioLDM 2 (diffusion, 16 kHz)", "cvssp/audioldm2", "", 4.5, "CC-BY-NC-SA-4.0", pipeline=True),
    Part("stable_audio", "Stable Audio Open (diffusion, 44.1 kHz)", "stabilityai/stable-audio-open-1.0", "", 5.3,
         "Stability AI Community License", pipeline=True),
)}  # fmt: skip


# -------------------------------------------------------------------------------------------------- finding a part
@dataclass(frozen=True)
class Located:
    """A part on this machine. path: its file, or its folder; source: a directory, or hub id@commit, for the run record."""

    part: Part
    path: Path
    source: str

    @property
    def files(self) -> list[Path]:
        """What is read of it: the file and those beside it, or the folder's configuration, weights and tokenizer."""
        if self.part.file:
            return [self.path, *(path for name in self.part.beside if (path := self.path.parent / name).is_file())]
        return sorted({path for pattern in self.part.patterns for path in self.path.glob(pattern)})

    @property
    def sha256(self) -> dict[str, str]:
        """{file name, below the part's folder: hex sha256}, computed when first asked for and once a process as long as a file
        does not change."""
        top = self.path.parent if self.part.file else self.path
        return {path.relative_to(top).as_posix(): sha256(path) for path in self.files}


def locate(part: str, source: str | Path | None = None, *, beside: str | Path | None = None, download: bool = True) -> Located:
    """Find a part on this machine, or fetch it where the user asked for that.

    part: a key of PARTS. source: a file; a directory that holds the part's file, or its own folder of that name; a hub id
    `owner/repository`, or `owner/repository/file` for another file name. Only a hub id given as the source is downloaded,
    and not under HF_HUB_OFFLINE=1 or with download=False. Without a source: in the directory `beside` (or that of the file
    `beside`), then under its default id in the hub's local cache.
    Raises FileNotFoundError in one line that says what it is, where to get it and where to put it.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: allowed are {', '.join(PARTS)}")
    part, named = PARTS[part], source is not None and str(source).strip() != ""
    path = Path(source if named else beside or "").expanduser()
    if named and path.exists():
        return _in_place(part, path.resolve())
    if not named and beside and path.exists():
        with contextlib.suppress(FileNotFoundError):
            return _in_place(part, path.resolve() if path.is_dir() else path.resolve().parent)
    hub, file = _hub_id(part, str(source)) if named else (part.hub, part.file)
    found = _cached(part, hub, file)
    reason = "is not in the hub's local cache"
    if found is None and named and offline():
        reason += " and HF_HUB_OFFLINE is set"
    elif found is None and named and download:
        found, reason = _download(part, hub, file)
    if found is None:
        raise FileNotFoundError(_absent(part, hub, file, reason, named))
    return Located(part, found, _at_commit(hub, found))


def _at_commit(hub: str, path: Path) -> str:
    """hub id@commit of a file or folder in the hub's cache."""
    commit = re.search(r"/snapshots/([^/]+)", path.as_posix())
    return f"{hub}@{commit[1]}" if commit else hub


def _in_place(part: Part, path: Path) -> Located:
    """The part at a path that exists: a file is taken as it is named, a directory is searched."""
    if path.is_file():
        if not part.file:
            raise FileNotFoundError(f"{path} is a file: {part.what} is a folder with {part.index}, weights and tokenizer; name it")
        return Located(part, path, str(path.parent))
    places = [path / part.folder, path]
    if part.file:
        names = dict.fromkeys((part.file, Path(part.file).name))
        found = [place / name for place in places for name in names if (place / name).is_file()]
        lack = part.file
    else:
        found = [place for place in places if not lacking(place, part)]
        lack = lacking(next((place for place in places if (place / part.index).is_file()), places[0]), part)
    if not found:
        raise FileNotFoundError(f"{part.what} is not in {path}: {lack} is missing; get it from {part.url} ({part.gigabytes:g} GB, "
                                f"{part.licence}) and put it at {path / part.place}")
    return Located(part, found[0], str(path))


def lacking(folder: Path, part: Part | None = None) -> str:
    """The first thing a folder lacks to be loaded as `part`, by default as a transformers model, in words; empty where it is
    whole."""
    weightless = part is not None and part.weightless
    if part is not None and part.pipeline:
        return _lacking_in_pipeline(folder)
    if not (folder / "config.json").is_file():
        return "config.json"
    for index in () if weightless else folder.glob("*.index.json"):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent and index.name.startswith("model.safetensors"):
            return f"{absent[0]} ({len(absent)} of {len(shards)} shards)"
    if not weightless and not any(folder.glob("*.safetensors")) and not (folder / "pytorch_model.bin").is_file():
        return "model.safetensors (or pytorch_model.bin)"
    return "" if any((folder / name).is_file() for name in TOKENIZERS) else f"a tokenizer ({' or '.join(TOKENIZERS)})"


def _lacking_in_pipeline(folder: Path) -> str:
    """As `lacking`, of a pipeline: its index, and what each of the models that are listed there needs."""
    if not (folder / "model_index.json").is_file():
        return "model_index.json"
    for name, entry in json.loads((folder / "model_index.json").read_text(encoding="utf-8")).items():
        kind = entry[-1] if isinstance(entry, list) and not name.startswith("_") else None
        if not kind or "Extractor" in kind:  # that of AudioLDM 2 ranks finished clips, which is not done here
            continue
        needed = [TOKENIZERS] if "Tokenizer" in kind else [("config.json",), ("*.safetensors",)]
        for names in [("scheduler_config.json",)] if "Scheduler" in kind else needed:
            if not any(any((folder / name).glob(file)) for file in names):
                return f"{name}/{' or '.join(names)}{' (no other format is read)' if '*' in names[0] else ''}"
    return ""


def pipeline_part(source: str | Path) -> str:
    """The key in PARTS of a pipeline: by the class that a folder's model_index.json names, by its hub id, else that of AudioLDM."""
    index = Path(source).expanduser() / "model_index.json"
    if index.is_file():
        return PIPELINES.get(str(json.loads(index.read_text(encoding="utf-8")).get("_class_name")), "audioldm")
    return next((part.name for part in PARTS.values() if part.pipeline and part.hub == str(source)), "audioldm")


def _hub_id(part: Part, source: str) -> tuple[str, str]:
    """`owner/repository[/file]` -> (id, file). FileNotFoundError for a path that is not there: what names a weight file, or lies
    in a folder that is here, is not asked of the hub."""
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", source)
    if source == part.hub:
        return source, part.file
    if not match or Path(match[1]).suffix in WEIGHT_FILES or Path(source).parent.is_dir():
        raise FileNotFoundError(f"{source!r} for {part.what}: there is no such file or folder, and it is no hub id "
                                f"(owner/repository) such as {part.hub}")
    return match[1], match[2] or part.file


def _cached(part: Part, hub: str, file: str) -> Path | None:
    """The file, or for an empty `file` the whole folder, in huggingface_hub's local cache. Asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub, file or part.index)
    if not isinstance(found, str):
        return None
    return Path(found) if file else (Path(found).parent if not lacking(Path(found).parent, part) else None)


def beside(source: str, directory: str | Path) -> str:
    """The place of the published model with hub id `source` inside a directory of weights, where it lies there; else `source`."""
    for part in PARTS.values():
        place = Path(directory).expanduser() / part.place
        if part.hub == source and place.exists():
            return str(place)
    return source


def provenance(source: str, part: str = "") -> dict:
    """{"source": directory or hub id@commit, "sha256": {file: hex}} of what was read of a source that has been loaded: a file, a
    folder, or a hub id, which stands for its snapshot in the local cache.

    part: the key in PARTS where it is one of them; else a model folder of transformers. A server has no sha256.
    """
    if part:
        found = locate(part, source, download=False)
        return {"source": found.source, "sha256": found.sha256}
    folder = Path(source).expanduser()
    if not folder.exists() and not source.startswith("http"):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, local_files_only=True))
        source = _at_commit(source, folder)
    files = sorted({file for pattern in FOLDER_FILES for file in folder.glob(pattern)})
    return {"source": source, "sha256": {file.name: sha256(file) for file in files}}


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, at start or since."""
    from huggingface_hub import constants

    return constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _download(part: Part, hub: str, file: str) -> tuple[Path | None, str]:
    """Fetch into the hub's cache: (path, "") or (None, why not).

    One question first, that ends after TIMEOUT seconds: without a network the download itself would try for six minutes.
    """
    import huggingface_hub

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(hub, file or part.index), timeout=TIMEOUT)
        print(f"downloading {part.what} from {hub}: about {_terms(part, hub)}", flush=True)
        if not file:
            path = Path(huggingface_hub.snapshot_download(hub, allow_patterns=list(part.patterns), etag_timeout=TIMEOUT))
            lack = lacking(path, part)
            return (None, f"came without {lack}") if lack else (path, "")
        for name in part.beside:
            huggingface_hub.hf_hub_download(hub, name, etag_timeout=TIMEOUT)
        return Path(huggingface_hub.hf_hub_download(hub, file, etag_timeout=TIMEOUT)), ""
    except Exception as error:  # of the hub, the connection, or the disk: all mean that the file is not here
        return None, f"could not be downloaded ({type(error).__name__}: {_line(error)})"


def _absent(part: Part, hub: str, file: str, reason: str, named: bool) -> str:
    what = f"{file} of {hub}" if file else hub
    ask = "" if named else f", or name the hub id {part.hub!r} as its source to have it downloaded"
    url = part.url if (hub, file) == (part.hub, part.file) else f"https://huggingface.co/{hub}"
    return (f"{part.what}: {what} {reason}; get it from {url} ({_terms(part, hub)}), put it into a directory as "
            f"{part.place} and name that directory{ask}")


def _terms(part: Part, hub: str) -> str:
    """Size and licence. Another repository holds a copy, but of a pipeline another model."""
    return "unknown size and licence" if part.pipeline and hub != part.hub else f"{part.gigabytes:g} GB, {part.licence}"


def sha256(path: Path) -> str:
    """Hex sha256 of a file; a large one is read once a process as long as its size and time do not change."""
    stat = path.stat()
    return _sha256(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------------------------------- reading and loading
def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one written by torch.save, on the CPU in the file's own dtypes.

    Tensors nested under generator, state_dict, model or weights are taken out, and the prefix `module.` of parallel training
    is dropped where all names have it. Nothing in the file is run. Raises ValueError in one line for anything else.
    """
    path = Path(path)
    content = read_content(path)
    while nested := [content[key] for key in NESTS if isinstance(content.get(key), Mapping)]:
        content = nested[0]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"{path} holds no tensors by name, but {keys}: a dictionary of tensors is needed")
    bare = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if bare else name: tensor for name, tensor in tensors.items()}


def read_content(path: str | Path) -> Mapping:
    """All that a weight file holds, notes beside the tensors included, or a ValueError that says in what way it is not one."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the weight file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    content = _content(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: a dictionary of tensors is needed")
    return content


def _content(path: Path):
    with path.open("rb") as file:
        head = file.read(64)
    again = "get it again"
    if not head:
        raise ValueError(f"{path} is empty: {again}")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path} is a web page, not weights: {again}, with the download link")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the weights: run git lfs pull")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NOTES):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({_line(error)}): {again}") from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(f"{path} holds code ({code[1].rstrip('.')}), which is not run: get the weights as safetensors or as a "
                             "plain dictionary of tensors") from None
        raise ValueError(f"{path} is not a weight file: allowed are .safetensors and what torch.save writes") from None
    except Exception as error:  # whatever else the parser meets in a broken file
        raise ValueError(f"{path} is cut off or damaged ({type(error).__name__}: {_line(error)}): {again}") from None


def _line(error: BaseException) -> str:
    """The first line of an error's text, at most 120 characters."""
    return (str(error).strip().split("\n") or [""])[0][:120]


def load_strict(module: nn.Module, state: Mapping[str, Tensor], name: str) -> nn.Module:
    """Load all of `state` into all of `module`, in the module's dtypes; returns the module.

    A module on the meta device gets the tensors as its own. Buffers that some published files carry (STRAY) are dropped.
    Raises ValueError in one line, with the first names and shapes that differ and their counts, and changes nothing.
    """
    own = module.state_dict()
    state = {key: tensor for key, tensor in state.items() if key in own or key not in STRAY}
    shapes = [key for key in own if key in state and state[key].shape != own[key].shape]
    found = [_first("missing", (key for key in own if key not in state)),
             _first("unexpected", (key for key in state if key not in own)),
             _first("of another shape", shapes)]  # fmt: skip
    if any(found):
        if shapes:
            found.append(f"{shapes[0]} is {tuple(state[shapes[0]].shape)} in the file and {tuple(own[shapes[0]].shape)} here")
        hint = f"; the file has {_sizes(state)}, this network {_sizes(own)}" if _sizes(state) and _sizes(own) else ""
        raise ValueError(f"{name} does not fit: {'; '.join(filter(None, found))}{hint}")
    if all(tensor.is_meta for tensor in own.values()):
        module.load_state_dict({key: tensor.to(own[key].dtype, copy=True) for key, tensor in state.items()}, assign=True)
    else:
        module.load_state_dict(state)
    return module


def _first(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {what} ({names[0]}{', …' if len(names) > 1 else ''})" if names else ""


# -------------------------------------------------------------------------------------------------- sizes of a FluxAudio
def flux_config(state: Mapping[str, Tensor]) -> dict[str, int | float]:
    """The sizes of the FluxAudio whose tensors these are, as its constructor takes them; all but latent_seq_len and use_rope,
    which leave no trace in the tensors. ValueError where they are not those of one."""
    try:
        hidden, latent_dim = state["audio_input_proj.0.weight"].shape[:2]
        head = len(state["joint_blocks.0.latent_block.attn.q_norm.weight"])
        width = len(state["audio_input_proj.2.w1.weight"])
        length, text_dim = state["empty_string_feat"].shape
        text_c_dim = len(state["empty_string_feat_c"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"these are not the tensors of a FluxAudio: {_line(error)} is missing or of another shape; "
                         f"found {', '.join(list(state)[:3])}, …") from None
    joint, fused = (_count(state, f"{kind}_blocks.") for kind in ("joint", "fused"))
    ratio = 4.0 if gated_width(4 * hidden) == width else 1.5 * width / hidden
    return dict(latent_dim=latent_dim, text_dim=text_dim, text_c_dim=text_c_dim, hidden_dim=hidden, depth=joint + fused,
                fused_depth=fused, num_heads=hidden // head, text_seq_len=length, mlp_ratio=ratio)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def _sizes(state: Mapping[str, Tensor]) -> str:
    """hidden 448, depth 52, latent 40, text 1024, in words; empty for tensors of something else."""
    try:
        config = flux_config(state)
    except ValueError:
        return ""
    return "hidden {hidden_dim}, depth {depth} ({fused_depth} fused), latent {latent_dim}, text {text_dim}".format(**config)
