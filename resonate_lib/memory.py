"""How much memory a training takes, worked out before anything starts: a plan of rows, its table, and a check that it fits.

Nothing is allocated: networks are built and run as shapes only (torch's fake tensors), and what their operations would keep
alive is counted. Sizes are bytes; GB are 10^9 bytes. Other models on the device are given by their size (`held`).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resonate_lib import dpo, flow, online, training
from resonate_lib.config import DiffROConfig, DPOConfig, GRPOConfig, NFTConfig, PretrainConfig
from resonate_lib.knobs import Config
from resonate_lib.models import codec, layers
from resonate_lib.models.flux_audio import Condition, FluxAudio

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
ALLOWANCE = 1_000_000_000  # of a GPU: driver, libraries and their workspaces; an allowance, not a measurement


@dataclass(frozen=True)
class Row:
    """One part of a plan: its bytes, when it is there ("" always, else the name of a phase), and which knobs shrink it."""

    part: str
    bytes: int
    phase: str = ""
    knobs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Use:
    """What `measure` found of a network, in bytes.

    weights; trained ones among them, or the adapters; latent and text of one clip; kept from a forward to its backward; update:
    at most in a forward and backward, without the gradients of weights; sampling: at most in a forward without gradients.
    """

    weights: int
    trained: int
    latent: int
    text: int
    kept: int
    update: int
    sampling: int


class Live(TorchDispatchMode):
    """Within it, `now` and `peak` are the bytes of storages that torch operations made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def start(self) -> int:
        """Forget the peak so far; returns `now`."""
        self.peak = self.now
        return self.now


def _compute_dtype(precision: str, device: str) -> torch.dtype:
    """What `training.autocast` computes in."""
    bf16 = precision == "bf16" or (precision == "auto" and training.has_fast_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


@contextlib.contextmanager
def _autocast(precision: str, device: str) -> Iterator[None]:
    """`training.autocast`, which torch refuses for a GPU that is not there."""
    if _compute_dtype(precision, device) == torch.float32:
        yield
        return
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.set_autocast_enabled(device, True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`layers.attend` by the kernels that a GPU takes: flash for bfloat16, memory-efficient for float32."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.dtype == torch.float32:
        out = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    else:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def _shapes_only(device: str) -> Iterator[None]:
    """Fake tensors on `device`, which need not exist; attention by the GPU's kernels there. Cached tables do not leak."""
    attend = layers.attend
    layers.rope_table.cache_clear()
    layers.attend = attend if device == "cpu" else _fused_attention
    try:
        with FakeTensorMode(), torch.device(device):
            yield
    finally:
        layers.attend = attend
        layers.rope_table.cache_clear()


@lru_cache(maxsize=16)  # stages of one run often ask the same; build makes the same network every time
def measure(
    build: Callable[[], FluxAudio], *, clips: int, guidance_scale: float = 1.0, sample_clips: int = 0,
    sample_guidance: float = 1.0, precision: str = "auto", device: str = "cpu", trained: str = "all", lora_rank: int = 32,
    checkpointing: bool = False,
) -> Use:  # fmt: skip
    """What a network needs to train on `clips` clips at once and to sample `sample_clips` (0: nothing), in seconds.

    build() makes the network; its usual latent and text lengths are taken. A guidance above 1 doubles a batch. What the
    forward keeps is counted; the backward, which torch cannot run without the device, is taken to need one block's
    activations more (on a CPU it needs 4 to 12 % less than that, with and without checkpointing). device: "cpu" or "cuda".
    """
    with _shapes_only(device), Live() as live:
        network = build().train()
        network.checkpointing, weights = checkpointing, live.start()
        learner = _learner(network, trained, lora_rank)
        learned = sum(p.numel() * p.element_size() for p in learner.parameters() if p.requires_grad)
        kept, peak = _forward(network, live, clips, guidance_scale, precision, device)
        block = _block(network, live, clips * (1 + (guidance_scale > 1)), precision, device)
        sampling = 0
        if sample_clips:
            with torch.no_grad():
                sampling = _forward(network, live, sample_clips, sample_guidance, precision, device)[1]
        latent, text = 4 * network.latent_seq_len * network.latent_dim, network.empty_string_feat.nbytes
    return Use(weights, learned, latent, text, kept, max(peak, kept + block), sampling)


def _learner(network: FluxAudio, trained: str, lora_rank: int):
    """What `online.learning` makes learn."""
    if trained == "lora":
        from resonate_lib.models import lora

        device = network.latent_mean.device
        with torch.device("meta"):  # peft would move them, which fake tensors refuse
            adapted = lora.attach(network, lora_rank)
        for layer in [m for m in network.modules() if isinstance(m, nn.Linear) and m.weight.device.type == "meta"]:
            layer.weight = nn.Parameter(torch.empty_like(layer.weight, device=device), layer.weight.requires_grad)
        return adapted
    left_out = [p for name, p in network.named_parameters() if not any(part in name for part in online.TRAINED[trained])]
    for parameter in left_out:
        parameter.requires_grad_(False)
    return network


def _forward(network, live: Live, clips, guidance_scale, precision, device) -> tuple[int, int]:
    """(kept at the end, at most on the way) in bytes."""
    tokens, width = network.empty_string_feat.shape
    condition = Condition(torch.empty(clips, tokens, width), torch.empty(clips, len(network.empty_string_feat_c)))
    x, before = torch.empty(clips, network.latent_seq_len, network.latent_dim), live.start()
    with _autocast(precision, device):
        velocity = flow.guided(network, x, 0.5, condition, guidance_scale)
    kept, peak = live.now - before, live.peak - before
    del velocity
    return kept, peak


def _block(network, live: Live, batch, precision, device) -> int:
    """Bytes that the first joint block, of the heaviest kind, keeps for its backward."""
    dtype, tokens = _compute_dtype(precision, device), network.text_seq_len
    x = torch.empty(batch, network.latent_seq_len, network.hidden_dim, dtype=dtype, requires_grad=True)
    text = torch.empty(batch, tokens, network.hidden_dim, dtype=dtype, requires_grad=True)
    c_act, tables = torch.empty(batch, 1, network.hidden_dim), network._tables(x.shape[1], tokens, x.device)
    before = live.start()
    with _autocast(precision, device):
        out = network.joint_blocks[0](x, text, c_act, tables)
    kept = live.now - before
    del out
    return kept


@lru_cache(maxsize=8)
def decoding(clips: int, *, seconds: float = 10.0, device: str = "cpu", gradients: bool = False) -> int:
    """Bytes at most while the published 44.1 kHz autoencoder and vocoder decode `clips` clips, a few at a time, in seconds.
    gradients: what their graph keeps, of all at once.

    cuDNN's workspaces, which no shape tells, are part of ALLOWANCE.
    """
    if not clips:
        return 0
    with _shapes_only(device), Live() as live, torch.set_grad_enabled(gradients):
        whole = codec.VaeCodec("44k", seconds=seconds)
        clips_at_once = clips if gradients else min(clips, codec.AT_A_TIME)
        latents = torch.empty(clips_at_once, whole.latent_dim, whole.latent_len, requires_grad=gradients)
        before = live.start()
        mel = whole.vae.decoder(latents)  # its own `decode` first looks at the weights' values, which shapes have not
        kept = whole.vocoder(mel)
        most = live.peak - before
        del mel, kept
    return most + 2 * clips * whole.samples * 4  # the clips so far, and their copy within full scale


def batches(config: Config) -> tuple[int, int]:
    """(clips per forward and backward, clips sampled at once; 0 where nothing is sampled) of a stage's configuration."""
    if isinstance(config, PretrainConfig):
        return _largest(config.batch_size, config.micro_batch), 0
    if isinstance(config, DPOConfig):
        sampled = 2 * min(config.pairs, dpo.PROMPTS_PER_BATCH)
        return 2 * _largest(min(config.batch_size, config.pairs), config.micro_batch // 2), _largest(sampled, config.sample_batch)
    if isinstance(config, DiffROConfig):
        sampled = _largest(config.prompts_per_step, config.micro_batch)
        return sampled, _largest(sampled, config.sample_batch)
    clips = config.prompts_per_step * config.group_size
    if isinstance(config, NFTConfig):
        update = -(-config.prompts_per_step // config.minibatches) * config.group_size
    else:
        update = -(-clips // config.minibatches)
    return _largest(update, config.micro_batch), _largest(clips, config.sample_batch)


def _largest(count: int, most: int) -> int:
    return max(part.stop - part.start for part in online.parts(count, most))


def plan(
    build: Callable[[], FluxAudio], config: Config, *, device: str = "cuda", held: dict[str, int] | None = None,
    decoding: int = 0, scoring: int = 0,
) -> list[Row]:  # fmt: skip
    """The rows of one stage: build() makes its network, config is its PretrainConfig, DPOConfig, GRPOConfig, NFTConfig or
    DiffROConfig.

    held: bytes of whatever else is on the device throughout (codec, text encoder, reward models; see `file_bytes`).
    decoding, scoring: bytes that the codec (see `decoding`) and the reward work in for one sampled batch.
    """
    clips, sampled = batches(config)
    differentiated = isinstance(config, DiffROConfig)  # the sampling's graph is kept while the codec's and the reward's are there
    scales = getattr(config, "guidance_scales", None) or (getattr(config, "guidance_scale", 1.0),)
    trained = getattr(config, "trained", "all")
    use = measure(
        build, clips=clips, guidance_scale=max(scales) if isinstance(config, (GRPOConfig, DiffROConfig)) else 1.0,
        sample_clips=0 if differentiated else sampled,
        sample_guidance=max(scales), precision=config.precision, device=device, trained=trained,
        lora_rank=getattr(config, "lora_rank", 0), checkpointing=config.checkpointing,
    )  # fmt: skip
    adapted = trained == "lora"
    lora = () if adapted or isinstance(config, PretrainConfig) else ("trained=lora",)
    less = (f"micro_batch below {clips}", *(() if config.checkpointing else ("checkpointing=true",)))
    rows = [Row("network, float32", use.weights), *(Row(name, size) for name, size in (held or {}).items())]
    rows += [Row("adapters", use.trained)] if adapted else []
    rows += [Row(name, use.trained if adapted else use.weights, "", lora) for name in _copies(config)]
    rows += [Row("optimizer state", 2 * use.trained, "", lora), Row("stored clips", _stored(config, use))]
    rows += [Row("driver and libraries", 0 if device == "cpu" else ALLOWANCE), Row("gradients", use.trained, "update", lora)]
    if differentiated:
        rows.append(Row(f"activations of {clips} clips, {config.last_steps} steps", config.last_steps * use.kept, "", less))
        rows.append(Row("one step's backward", use.update - use.kept, "update", less))
    else:
        rows.append(Row(f"activations of {clips} clips", use.update, "update", less))
    rows.append(Row(f"sampling {sampled} clips", use.sampling, "sampling", (f"sample_batch below {sampled}",)))
    both = "hearing" if differentiated else ""  # one graph
    rows += [Row(f"decoding {sampled} clips", decoding, both or "decoding")]
    rows += [Row(f"scoring {sampled} clips", scoring, both or "scoring")]
    return [row for row in rows if row.bytes]


def _copies(config: Config) -> list[str]:
    """Other versions of what learns that a training holds; the reference of LoRA is the network itself."""
    compared = isinstance(config, DPOConfig) or getattr(config, "beta_kl" if isinstance(config, NFTConfig) else "beta", 0)
    names = ["reference"] if compared and config.trained != "lora" else []
    names += ["old policy"] if isinstance(config, NFTConfig) else []
    return names + (["averaged weights"] if getattr(config, "ema", 0) else [])


def _stored(config: Config, use: Use) -> int:
    """Bytes of a round's clips: final latents or whole trajectories with their noises, and conditions."""
    if isinstance(config, PretrainConfig):
        return 0
    if isinstance(config, DPOConfig):
        return config.pairs * (2 * use.latent + use.text)
    latents = 2 * config.num_steps + 2 if isinstance(config, GRPOConfig) else 2
    return config.prompts_per_step * getattr(config, "group_size", 1) * (latents * use.latent + use.text)


def file_bytes(path: str | Path) -> int:
    """Size of a weights file, or of the weights in a folder: its safetensors, else all of WEIGHTS, which often are the same
    weights again. FileNotFoundError when there are none."""
    path = Path(path)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.suffix in WEIGHTS and file.is_file()]
    files = [file for file in files if file.suffix == ".safetensors"] or files
    if not files:
        raise FileNotFoundError(f"no weights in {path}: name a file, or a folder with {', '.join(WEIGHTS)} files")
    return sum(file.stat().st_size for file in files)


def total(rows: list[Row]) -> tuple[int, str]:
    """(bytes at the worst moment, the phase it is in): what is always there and the largest phase."""
    phases: dict[str, int] = {}
    for row in rows:
        phases[row.phase] = phases.get(row.phase, 0) + row.bytes
    always = phases.pop("", 0)
    worst = max(phases, key=phases.get, default="")
    return always + phases.get(worst, 0), worst


def table(rows: list[Row], available_bytes: int | None = None) -> str:
    """The plan as text, one part a line in GB, with its total and what the device has."""
    needed, phase = total(rows)
    lines = [(row.part, row.bytes, row.phase or "always") for row in rows]
    lines.append(("in all", needed, f"at most, in {phase}" if phase else ""))
    if available_bytes is not None:
        lines.append(("there is", available_bytes, ""))
    width = max(len(part) for part, *_ in lines)
    return "\n".join(f"{part:<{width}} {size / 1e9:8.2f} GB  {when}".rstrip() for part, size, when in lines)


def check(rows: list[Row], available_bytes: int) -> None:
    """MemoryError in one line, with the knobs that would help most, when the plan does not fit."""
    needed, phase = total(rows)
    if needed <= available_bytes:
        return
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.knobs and row.phase in ("", phase):
            groups.setdefault(row.knobs, []).append(row)
    saved = {knobs: sum(row.bytes for row in group) for knobs, group in groups.items()}
    advice = [f"{' or '.join(knobs)} ({', '.join(row.part for row in groups[knobs])}: {saved[knobs] / 1e9:.1f} GB)"
              for knobs in sorted(saved, key=saved.get, reverse=True)]  # fmt: skip
    raise MemoryError(f"needs {needed / 1e9:.1f} GB, there are {available_bytes / 1e9:.1f} GB: try "
                      + (", ".join(advice) or "a larger device"))  # fmt: skip


def available(device: str = "cuda") -> int:
    """Bytes free now on the device: of the first GPU, or of RAM for "cpu"."""
    return psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
