"""Text encoder, network and codec as one thing: encode prompts, sample latents, decode audio, load, save.

Of the embedded kind (MiniLM, mel codec) network and codec are saved. Around published parts (FLAN-T5, VAE and vocoder, or a
pipeline of diffusers, see `pipelines.load_pipeline`) the network alone is, with a note of where the others lie.
"""

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from resonate_lib import samplers, training
from resonate_lib.diffusion import AngularDiffusion, Diffusion
from resonate_lib.models import lora, storage
from resonate_lib.models.bigvgan import without_weight_norm
from resonate_lib.models.codec import MELS, MelCodec, VaeCodec
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.models.pretrained import PARTS, Located, flux_config, load_strict, locate, read_weights
from resonate_lib.models.text import MAX_TOKENS, MiniLMEncoder, T5Encoder

LISTENING_ITERATIONS = 60  # Griffin-Lim rounds of the decode that people hear
MODES = {mel["sample_rate"]: mode for mode, mel in MELS.items()}
KEPT_BYTES = 8 * 2**30  # of text states that are remembered, some 26,000 prompts of FLAN-T5-large; the oldest go first


class Generator:
    """A text-to-audio generator. Latents are in the network's (normalised) space everywhere but inside the codec.

    text: prompts -> Condition; network: FluxAudio; codec: encode/decode raw latents. latent_shape: (N, C). parts: the
    published ones it is built from, by their key in `pretrained.PARTS`; empty for the embedded kind. diffusion: the process
    whose prediction the network makes, which then samples; None for a flow.
    """

    def __init__(self, text, network: FluxAudio, codec, network_config: dict, parts: dict[str, Located] | None = None,
                 diffusion: Diffusion | None = None):
        self.text, self.network, self.codec, self.network_config = text, network, codec, network_config
        self.parts, self.diffusion = parts or {}, diffusion
        self.sample_rate = codec.sample_rate
        self.latent_shape = (codec.latent_len, codec.latent_dim)
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept_bytes = 0

    @classmethod
    def new(cls, codec: MelCodec, *, hidden_dim=192, depth=6, fused_depth=4, num_heads=3, mlp_ratio=4.0,
            text_seq_len=MAX_TOKENS, seed=0, diffusion: Diffusion | None = None) -> "Generator":
        """An untrained generator around a fitted codec, its weights a function of the seed. text_seq_len: a prompt's longest;
        diffusion: as in `Generator`."""
        text = MiniLMEncoder(text_seq_len)
        config = dict(latent_dim=codec.latent_dim, text_dim=text.text_dim, text_c_dim=text.text_dim, hidden_dim=hidden_dim,
                      depth=depth, fused_depth=fused_depth, num_heads=num_heads, latent_seq_len=codec.latent_len,
                      text_seq_len=text.length, mlp_ratio=mlp_ratio)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = FluxAudio(**config)
        _know_the_empty_string(network, text)
        return cls(text, network, codec, config, diffusion=diffusion)

    @classmethod
    def load_published(cls, source=None, *, part="generator_pt", vae=None, vocoder=None, text=None, mode="44k", seconds=10.0,
                       device=None) -> "Generator":
        """A published checkpoint with its codec and FLAN-T5, in float32; the network has the sizes of its tensors.

        part: generator_pt or generator_grpo, or with a file as source any checkpoint of these names. source, vae, vocoder, text:
        as `pretrained.locate` takes them; the others are looked for in the directory that `source` is, or lies in, before the
        hub's cache. mode: of the codec; seconds: of a clip; device: by default the GPU where there is one.
        Raises FileNotFoundError for a part that is absent, ValueError for files that are damaged or do not fit together.
        """
        parts = {part: locate(part, source), **_locate_around(mode, source, vae, vocoder, text)}
        state = read_weights(parts[part].path)
        config = flux_config(state)
        text, codec = _load_around(parts, mode, seconds, config["text_seq_len"])
        config["latent_seq_len"] = codec.latent_len
        network = _load_network(config, state, parts[part].path, text, codec)
        return cls(text, network, codec, config, parts)._on(device)

    @classmethod
    def new_published(cls, source=None, *, vae=None, vocoder=None, text=None, mode="44k", seconds=10.0, device=None, seed=0,
                      hidden_dim=448, depth=52, fused_depth=36, num_heads=7, mlp_ratio=4.0, text_seq_len=MAX_TOKENS,
                      diffusion: Diffusion | None = None) -> "Generator":
        """An untrained network (sizes by default the published ones) around the published codec and text encoder.

        Arguments as for `load_published` and `new`. The latent statistics are the published ones where the codec has the published
        width, else unset until `pretrain.encode_corpus` measures them.
        """
        parts = _locate_around(mode, source, vae, vocoder, text)
        text, codec = _load_around(parts, mode, seconds, text_seq_len)
        config = dict(latent_dim=codec.latent_dim, text_dim=text.text_dim, text_c_dim=text.text_dim, hidden_dim=hidden_dim,
                      depth=depth, fused_depth=fused_depth, num_heads=num_heads, latent_seq_len=codec.latent_len,
                      text_seq_len=text_seq_len, mlp_ratio=mlp_ratio)
        statistics = json.loads(Path(__file__).with_name("latent_statistics.json").read_text())[mode]
        known = len(statistics["latent_mean"]) == codec.latent_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = FluxAudio(**config, **(statistics if known else {}))
        _know_the_empty_string(network, text)
        return cls(text, network, codec, config, parts, diffusion)._on(device)

    def _on(self, device) -> "Generator":
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        for module in (self.text, self.network, self.codec):
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.network.latent_mean.device

    def fork(self) -> "Generator":
        """A generator with a copy of the network to train, sharing the text encoder and the codec."""
        return Generator(self.text, copy.deepcopy(self.network), self.codec, self.network_config, self.parts, self.diffusion)

    def with_network(self, folder) -> "Generator":
        """The generator that `save` wrote into `folder`, sharing this one's text encoder, codec and encoded prompts: a tuning of
        it. ValueError where it is of another size, or not of the same process."""
        folder = Path(folder)
        facts = json.loads(_present(folder, "generator.json").read_text())
        config, diffusion = facts["network"], _process(facts)
        weights = _present(folder, "network.safetensors")
        if config != self.network_config:
            raise ValueError(f"{folder}: its network is {config}, this one {self.network_config}; name a tuning of the same base")
        if diffusion != self.diffusion:
            mine, other = (process or "a flow" for process in (self.diffusion, diffusion))
            raise ValueError(f"{folder}: its network is of {other}, this one of {mine}; name a tuning of the same base")
        network = load_strict(copy.deepcopy(self.network), storage.read(weights), str(weights)).eval()
        network.adapter = None
        other = Generator(self.text, network, self.codec, config, self.parts, diffusion)
        other._known = self._known
        return other

    def provenance(self) -> dict[str, dict]:
        """{part: {"source", "sha256": {file: hex}}} of the published parts, for the run record; reads their files once."""
        return {name: {"source": found.source, "sha256": found.sha256} for name, found in self.parts.items()}

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Condition of B prompts on the network's device, each encoded once as long as KEPT_BYTES hold its states.

        They are kept on the CPU in the encoder's `kept_dtype`. Over text_seq_len tokens: ValueError, or around published parts
        cut there.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            text_f, text_f_c = self.text(new)
            for prompt, states, pooled in zip(new, text_f.cpu(), text_f_c.cpu(), strict=True):
                used = int(states.any(-1).nonzero().max()) + 1  # zeros past the end are not kept: ten times less memory
                self._known[prompt] = (states[:used].to(self.text.kept_dtype, copy=True), pooled)
                self._kept_bytes += self._known[prompt][0].nbytes
        text_f = torch.zeros(len(prompts), self.text.length, self.text.text_dim)
        for row, prompt in zip(text_f, prompts, strict=True):
            states = self._known[prompt][0]
            row[: len(states)] = states
        text_f_c = torch.stack([self._known[prompt][1] for prompt in prompts])
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= self._known.pop(next(iter(self._known)))[0].nbytes
        return Condition(text_f, text_f_c).to(self.device)

    def encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, T) at `sample_rate` -> normalised latents (B, N, C)."""
        return self.network.normalize(self.codec.encode(audio))

    @torch.no_grad()
    def generate(self, prompts: list[str], *, steps: int = 25, guidance_scale: float = 1.0, seeds: list[int],
                 network: FluxAudio | None = None, precision: str = "auto") -> torch.Tensor:
        """Latents (B, N, C) from noise that each sample's seed fixes: Euler steps of a flow, DDIM steps of a diffusion, both
        deterministic. network: another one in place of its own."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed a prompt")
        noise = samplers.draw_noise(self.latent_shape, seeds).to(self.device)
        sampler = self.diffusion or samplers
        with training.autocast(precision, self.device.type):
            return sampler.ode_sample(network or self.network, noise, self.encode_prompts(prompts), steps=steps,
                                      guidance_scale=guidance_scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, iterations: int = LISTENING_ITERATIONS, normalised: bool = True,
               limit: bool = True) -> torch.Tensor:
        """Latents (B, N, C) -> waveforms (B, T) on the CPU, by one gain a clip within full scale unless limit=False.

        normalised=False repeats the published RL code, which decoded normalised latents as if they were raw.
        """
        latents = latents.to(self.device).float()
        raw = self.network.unnormalize(latents) if normalised else latents
        return self.codec.decode(raw, iterations=iterations, limit=limit).cpu()

    def decode_with_gradient(self, latents: torch.Tensor, *, iterations: int = LISTENING_ITERATIONS) -> torch.Tensor:
        """Latents (B, N, C) -> waveforms (B, T) as `decode` gives them, on the codec's device, with a gradient to the latents."""
        return self.codec.decode_with_gradient(self.network.unnormalize(latents.float()), iterations=iterations)

    def save(self, folder, *, bits: int | None = None, **facts):
        """network.safetensors, codec.safetensors, generator.json (configuration and the facts given). bits: a weight's on disk, 32,
        16 or 8 (see `storage.packed`); the codec, which everything is heard through, never has fewer than 16.

        Around published parts: no codec.safetensors; generator.json names the parts, and bits is 32 unless asked for (of the
        embedded kind 16), so that what a checkpoint gives is what the network gave.
        """
        bits = (32 if self.parts else 16) if bits is None else bits
        facts = {"network": self.network_config, "codec": self.codec.config, **facts}
        stored = {"network": storage.packed(self.network.state_dict(), bits)}
        if not self.parts:
            stored["codec"] = storage.packed(self.codec.state_dict(), max(bits, 16))
        if self.diffusion is not None:
            facts["diffusion"] = asdict(self.diffusion)
        if self.parts:
            facts["parts"] = {name: {"source": found.source, "path": str(found.path)} for name, found in self.parts.items()}
        with training.atomic_folder(folder) as temporary:
            for name, tensors in stored.items():
                save_file(tensors, temporary / f"{name}.safetensors")
            if self.network.adapter is not None:
                lora.save(self.network.adapter, temporary / "adapter.safetensors")
            (temporary / "generator.json").write_text(json.dumps(facts, indent=1) + "\n")

    def export(self, path):
        """The network's tensors in one file of torch.save under the published names: what the published code loads."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            torch.save({name: tensor.cpu() for name, tensor in self.network.state_dict().items()}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def facts(folder) -> dict:
        """What `save` was told about the model in `folder`: seed, steps, …"""
        config = json.loads((Path(folder) / "generator.json").read_text())
        return {key: value for key, value in config.items() if key not in ("network", "codec", "parts", "diffusion")}

    @classmethod
    def load(cls, folder, source=None, *, vae=None, vocoder=None, text=None, device=None) -> "Generator":
        """From a folder that `save` wrote; FileNotFoundError says what is missing.

        Published parts are taken from where they lay when it was saved, unless another place is given (arguments as for
        `load_published`, as is the device; the embedded kind stays on the CPU).
        """
        folder = Path(folder)
        if source is not None and not Path(source).is_dir():
            raise FileNotFoundError(f"{source}: there is no such directory; name one that holds the codec and the text encoder")
        config = json.loads(_present(folder, "generator.json").read_text())
        weights, diffusion = _present(folder, "network.safetensors"), _process(config)
        if "pipeline" in config["network"]:
            from resonate_lib.models.pipelines import load_saved  # diffusers takes seconds to import

            return load_saved(config, weights, source, device)
        if "parts" in config:
            mode, seconds = config["codec"]["mode"], config["codec"]["seconds"]
            parts = _locate_around(mode, source, vae, vocoder, text, config["parts"])
            text, codec = _load_around(parts, mode, seconds, config["network"]["text_seq_len"])
            network = _load_network(config["network"], storage.read(weights), weights, text, codec)
            return cls(text, network, codec, config["network"], parts, diffusion)._on(device)
        sound = _present(folder, "codec.safetensors")
        codec = load_strict(MelCodec(**config["codec"]), storage.read(sound), str(sound))
        network = load_strict(FluxAudio(**config["network"]), storage.read(weights), str(weights)).eval()
        return cls(MiniLMEncoder(config["network"]["text_seq_len"]), network, codec, config["network"], diffusion=diffusion)


def codec_mode(sample_rate: int) -> str:
    """The published codec for audio of so many Hz: "16k" or "44k". ValueError for another rate."""
    if sample_rate not in MODES:
        raise ValueError(f"sample_rate={sample_rate}: published codecs are for {' or '.join(map(str, sorted(MODES)))} Hz; use one")
    return MODES[sample_rate]


def _process(facts: dict) -> Diffusion | None:
    """What generator.json says of the process: None for a flow."""
    found = facts.get("diffusion")
    return (AngularDiffusion if "sigma_max" in found else Diffusion)(**found) if found else None


def _present(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"no generator in {folder}: {name} is missing; name a folder that Generator.save wrote")
    return folder / name


def _know_the_empty_string(network: FluxAudio, text):
    """Store what the encoder makes of the empty string: what guidance and caption dropout put in place of a prompt."""
    empty = text([""])
    with torch.no_grad():
        network.empty_string_feat.copy_(empty.text_f[0])
        network.empty_string_feat_c.copy_(empty.text_f_c[0])


def _locate_around(mode, source, vae, vocoder, text, saved: dict | None = None) -> dict[str, Located]:
    """VAE, vocoder and text encoder by part: from the place given for each, else where `saved` (generator.json) says, else
    in `source` where that is a directory, else in the hub's cache."""
    found = {}
    for part, place in ((f"vae_{mode}", vae), (f"vocoder_{mode}", vocoder), ("t5", text)):
        before = (saved or {}).get(part)
        if place is None and source is None and before and Path(before["path"]).exists():
            found[part] = Located(PARTS[part], Path(before["path"]), before["source"])
        else:
            found[part] = locate(part, place, beside=source)
    return found


def _load_around(parts: dict[str, Located], mode: str, seconds: float, tokens: int) -> tuple[T5Encoder, VaeCodec]:
    """The text encoder and the codec of what `_locate_around` found, on the CPU."""
    vae = parts[f"vae_{mode}"].path
    vocoder = parts[f"vocoder_{mode}"].path
    state = read_weights(vae)
    try:
        sizes = dict(hidden_dim=len(state["encoder.conv_in.weight"]), embed_dim=state["decoder.conv_in.weight"].shape[1])
    except (KeyError, IndexError):
        raise ValueError(f"{vae} does not hold the published autoencoder: encoder.conv_in.weight or decoder.conv_in.weight is "
                         "missing; name its file") from None
    beside = vocoder.parent / "config.json"  # of this vocoder, unless it lies among files of the other mode
    config = json.loads(beside.read_text()) if beside.is_file() else {}
    with torch.device("meta"):  # nothing to draw: every tensor comes from the files
        codec = VaeCodec(mode, seconds=seconds, **sizes, vocoder=config if config.get("num_mels") == MELS[mode]["bands"] else None)
    load_strict(codec.vae, state, str(vae)).remove_weight_norm()
    load_strict(codec.vocoder, without_weight_norm(read_weights(vocoder)), str(vocoder))
    return T5Encoder(parts["t5"].path, tokens, truncate=True), codec.eval()


def _load_network(config: dict, state: dict, path: Path, text, codec) -> FluxAudio:
    if (config["text_dim"], config["text_c_dim"], config["latent_dim"]) != (text.text_dim, text.text_dim, codec.latent_dim):
        raise ValueError(f"{path} hears text of {config['text_dim']} numbers and makes latents of {config['latent_dim']}; the text "
                         f"encoder gives text of {text.text_dim}, the codec latents of {codec.latent_dim}: name those it knows")
    with torch.device("meta"):
        network = FluxAudio(**config)
    return load_strict(network, state, str(path)).eval()
