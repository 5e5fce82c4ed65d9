"""Generated clips kept on disk, so that an interrupted benchmark goes on where it stopped and no clip is made twice.

A store holds one folder for each model and setting, named by content: what the weights, the code and the settings are decides
the name, not what they are called. In it lies one FLAC file a clip, whole or absent. What a scorer hears is what the file holds,
so a clip just made and one found again give the same numbers. Which clips are needed is the business of `ttabench.evaluate`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from resonate_lib import audio as audio_io
from resonate_lib import record, training
from resonate_lib.models.codec import within_full_scale

BEFORE = ("peak_dbfs", "clipping", "gain")  # facts of a clip that its samples no longer tell
LEFT_OVER = 3600  # seconds after which an unfinished file belongs to no living process


class Wanted(NamedTuple):
    """One clip of a model at one setting: which prompt, which of its samples, and the seed of its noise."""

    id: str
    sample: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        """`<prompt id>_<sample>-<8 hex of the prompt's text and the seed>.flac`."""
        return f"{audio_io.file_stem(self.id)}_{self.sample}-{record.hash8([self.prompt, self.seed])}.flac"


class Store:
    """All clips below `folder`. made, found: how many were generated, and how many were there already, since it was opened."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made = self.found = 0
        self._frozen: WeakKeyDictionary = WeakKeyDictionary()

    def shelf(self, generator, *, num_steps: int, guidance_scale: float, decode_iterations: int) -> Shelf:
        """The clips of a generator, as its weights are now, at these settings."""
        device = generator.device.type
        content = self._model(generator) | {
            "code": _code(),
            "solver": "ddim" if generator.diffusion else "euler",
            "num_steps": int(num_steps),
            "guidance_scale": float(guidance_scale),
            "decode_iterations": int(decode_iterations),
            "precision": "bf16" if training.has_fast_bf16(device) else "float32",
            "device": device,
        }
        return Shelf(self, self.folder / content_name(content), content)

    def _model(self, generator) -> dict[str, str]:
        """sha256 of the network, and of the codec and the text encoder, which are frozen and so looked at once."""
        text, codec = generator.text, generator.codec
        for module, facts in ((codec, codec.config), (text, _text_facts(text))):
            if module not in self._frozen:
                self._frozen[module] = sha256_module(module, {"class": type(module).__name__, **facts})
        process = {"diffusion": asdict(generator.diffusion)} if generator.diffusion else {}
        network = sha256_module(generator.network, generator.network_config | process)
        return {"network": network, "codec": self._frozen[codec], "text": self._frozen[text]}

    def note(self, clips: int, generator) -> str:
        """What so many clips may take on disk at most (16 bits a sample, uncompressed), and what is free: a line to print first."""
        each = 2 * generator.codec.samples
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        there = sum(path.stat().st_size for path in self.folder.glob("*/*.flac"))
        return (
            f"at most {clips} clips of {each / 1e6:.2f} MB or less, {clips * each / 1e9:.2f} GB in the cache; "
            f"{free / 1e9:.1f} GB are free, and of {there / 1e9:.2f} GB of older clips none is made again"
        )


class Shelf:
    """The clips of one model at one setting; `settings.json` beside them says which."""

    def __init__(self, store: Store, folder: Path, content: dict):
        self.store, self.folder = store, folder
        if not (folder / "settings.json").is_file():
            _write(folder / "settings.json", (json.dumps(content, indent=1) + "\n").encode())
        for part in folder.glob(".*.part"):  # of a process that was killed while it wrote
            with contextlib.suppress(FileNotFoundError):  # another process may be as tidy
                if time.time() - part.stat().st_mtime > LEFT_OVER:
                    part.unlink()
        self.facts = {"guidance": content["guidance_scale"], "steps": content["num_steps"]}

    def has(self, clip: Wanted) -> bool:
        """Whether there is a file of this clip; only reading it shows whether it is sound."""
        return (self.folder / clip.file).is_file()

    def fetch(
        self, wanted: Sequence[Wanted], make: Callable[[list[Wanted]], torch.Tensor], sample_rate: int
    ) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """The clips (B, T) within full scale, and by name (B,) what was true before the gain that keeps them there: peak_dbfs,
        clipping, and that gain (1 for most).

        make: clips that turn out to be damaged -> their sound (M, T) as the model gives it; called at most once.
        """
        clips = [self.read(clip, sample_rate) for clip in wanted]
        damaged = [clip for clip, found in zip(wanted, clips, strict=True) if found is None]
        if damaged:
            self.write(damaged, make(damaged), sample_rate)
            self.store.found -= len(damaged)
            clips = [found or self.read(clip, sample_rate) for clip, found in zip(wanted, clips, strict=True)]
            if None in clips:
                raise OSError(f"{self.folder}: a clip just written is not what is read back; check the disk, or set RESONATE_CACHE")
        before = {name: np.array([facts[name] for _, facts in clips]) for name in BEFORE}
        return torch.stack([waveform for waveform, _ in clips]), before

    def read(self, clip: Wanted, sample_rate: int) -> tuple[torch.Tensor, dict] | None:
        """The waveform (T,) and BEFORE of a stored clip; None where it is absent, damaged or not the clip it is called."""
        try:
            waveform, rate, comment = audio_io.decode((self.folder / clip.file).read_bytes())
            facts = json.loads(comment)
            own = (facts["prompt"], facts["seed"], rate, facts["crc32"]) == (clip.prompt, clip.seed, sample_rate, _crc32(waveform))
            return (waveform, _before(facts)) if own else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, wanted: Sequence[Wanted], loud: torch.Tensor, sample_rate: int) -> None:
        """Store clips as the model gave them (B, T), brought within full scale. OSError in one line where the disk is full."""
        gains = (0.99 / loud.abs().amax(dim=1)).clamp(max=1.0).tolist()
        heard = (within_full_scale(loud) * 32768).round() / 32768 + 0.0  # what 16 bits hold, which is no -0.0
        files = []
        for clip, raw, waveform, gain in zip(wanted, loud, heard, gains, strict=True):
            peak = audio_io.peak_dbfs(raw)
            facts = {"peak_dbfs": peak if math.isfinite(peak) else None, "clipping": audio_io.is_clipping(raw), "gain": gain}
            comment = json.dumps(clip._asdict() | self.facts | facts | {"crc32": _crc32(waveform)})
            files.append((self.folder / clip.file, audio_io.encode(waveform, sample_rate, ".flac", comment=comment)))
        for path, data in files:  # all at once, so that an interruption seldom parts a batch
            _write(path, data)
        self.store.made += len(wanted)


def content_name(content: dict) -> str:
    """Sixteen hex digits of the sha256 of `content` as canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def sha256_module(module: torch.nn.Module, facts: dict) -> str:
    """Hex sha256 over `facts` (JSON) and a module's tensors: names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _text_facts(text) -> dict:
    """What a text encoder is beside its weights: how many tokens it takes, and how it cuts a text into them."""
    return {"length": text.length, "tokens": sorted(text.tokenizer.get_vocab().items())}


@cache
def _code() -> str:
    """sha256 of the code that turns weights and a prompt into sound: clips of a changed sampler or codec are other clips."""
    library = Path(__file__).resolve().parent.parent
    files = [*(library / f"{name}.py" for name in ("flow", "samplers", "diffusion")), *sorted((library / "models").glob("*.py"))]
    return hashlib.sha256("".join(record.sha256_file(path) for path in files).encode()).hexdigest()


def _crc32(waveform: torch.Tensor) -> int:
    return zlib.crc32(waveform.numpy())


def _before(facts: dict) -> dict:
    """BEFORE of a file's facts; JSON has no -inf, the peak of digital silence."""
    return {name: -math.inf if facts[name] is None else facts[name] for name in BEFORE}


def _write(path: Path, data: bytes) -> None:
    try:
        audio_io.write_bytes(path, data)
    except OSError as error:
        raise OSError(f"{error}, by RESONATE_CACHE, or delete {path.parent.parent}: its clips are made again when needed") from None
