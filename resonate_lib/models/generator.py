"""Text encoder, flow network and codec as one thing: encode prompts, sample latents, decode audio, load, save."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from resonate_lib import samplers, training
from resonate_lib.models.codec import MelCodec
from resonate_lib.models.flux_audio import Condition, FluxAudio
from resonate_lib.models.text import MAX_TOKENS, MiniLMEncoder

LISTENING_ITERATIONS = 60  # Griffin-Lim rounds of the decode that people hear


class Generator:
    """A text-to-audio generator. Latents are in the network's (normalised) space everywhere but inside the codec.

    text: prompts -> Condition; network: FluxAudio; codec: encode/decode raw latents. latent_shape: (N, C).
    """

    def __init__(self, text, network: FluxAudio, codec, network_config: dict):
        self.text, self.network, self.codec, self.network_config = text, network, codec, network_config
        self.sample_rate = codec.sample_rate
        self.latent_shape = (codec.latent_len, codec.latent_dim)
        self._known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @classmethod
    def new(cls, codec: MelCodec, *, hidden_dim=192, depth=6, fused_depth=4, num_heads=3, mlp_ratio=4.0,
            text_seq_len=MAX_TOKENS, seed=0) -> "Generator":
        """An untrained generator around a fitted codec, its weights a function of the seed. text_seq_len: a prompt's longest."""
        text = MiniLMEncoder(text_seq_len)
        config = dict(latent_dim=codec.latent_dim, text_dim=text.text_dim, text_c_dim=text.text_dim, hidden_dim=hidden_dim,
                      depth=depth, fused_depth=fused_depth, num_heads=num_heads, latent_seq_len=codec.latent_len,
                      text_seq_len=text.length, mlp_ratio=mlp_ratio)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = FluxAudio(**config)
        empty = text([""])
        with torch.no_grad():
            network.empty_string_feat.copy_(empty.text_f[0])
            network.empty_string_feat_c.copy_(empty.text_f_c[0])
        return cls(text, network, codec, config)

    def fork(self) -> "Generator":
        """A generator with a copy of the network to train, sharing the text encoder and the codec."""
        return Generator(self.text, copy.deepcopy(self.network), self.codec, self.network_config)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        """Condition of B prompts, each encoded once in the generator's life. ValueError over text_seq_len tokens."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            text_f, text_f_c = self.text(new)
            for prompt, states, pooled in zip(new, text_f, text_f_c, strict=True):
                used = int(states.any(-1).nonzero().max()) + 1  # zeros past the end are not kept: ten times less memory
                self._known[prompt] = (states[:used].half(), pooled)
        text_f = torch.zeros(len(prompts), self.text.length, self.text.text_dim)
        for row, prompt in zip(text_f, prompts, strict=True):
            states = self._known[prompt][0]
            row[: len(states)] = states
        return Condition(text_f, torch.stack([self._known[prompt][1] for prompt in prompts]))

    def encode_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, T) at `sample_rate` -> normalised latents (B, N, C)."""
        return self.network.normalize(self.codec.encode(audio))

    @torch.no_grad()
    def generate(self, prompts: list[str], *, steps: int = 25, guidance_scale: float = 1.0, seeds: list[int],
                 network: FluxAudio | None = None, precision: str = "auto") -> torch.Tensor:
        """Latents (B, N, C): Euler steps from noise that each sample's seed fixes. network: another one in place of its own."""
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed a prompt")
        noise = samplers.draw_noise(self.latent_shape, seeds)
        with training.autocast(precision):
            return samplers.ode_sample(network or self.network, noise, self.encode_prompts(prompts), steps=steps,
                                       guidance_scale=guidance_scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, *, iterations: int = LISTENING_ITERATIONS, normalised: bool = True,
               limit: bool = True) -> torch.Tensor:
        """Latents (B, N, C) -> waveforms (B, T), by one gain a clip within full scale unless limit=False.

        normalised=False repeats the published RL code, which decoded normalised latents as if they were raw.
        """
        raw = self.network.unnormalize(latents.float()) if normalised else latents.float()
        return self.codec.decode(raw, iterations=iterations, limit=limit)

    def save(self, folder, *, half: bool = True, **facts):
        """network.safetensors, codec.safetensors, generator.json (configuration and the facts given). half: stored as float16."""
        facts = {"network": self.network_config, "codec": self.codec.config, **facts}
        with training.atomic_folder(folder) as temporary:
            for name, module in (("network", self.network), ("codec", self.codec)):
                state = {k: (v.half() if half else v).contiguous() for k, v in module.state_dict().items()}
                save_file(state, temporary / f"{name}.safetensors")
            (temporary / "generator.json").write_text(json.dumps(facts, indent=1) + "\n")

    @staticmethod
    def facts(folder) -> dict:
        """What `save` was told about the model in `folder`: seed, steps, …"""
        config = json.loads((Path(folder) / "generator.json").read_text())
        return {key: value for key, value in config.items() if key not in ("network", "codec")}

    @classmethod
    def load(cls, folder) -> "Generator":
        """From a folder that `save` wrote; FileNotFoundError says what is missing."""
        folder = Path(folder)
        for name in ("generator.json", "network.safetensors", "codec.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no generator in {folder}: {name} is missing; name a folder that Generator.save wrote")
        config = json.loads((folder / "generator.json").read_text())
        codec = MelCodec(**config["codec"])
        codec.load_state_dict(_float(load_file(folder / "codec.safetensors")))
        network = FluxAudio(**config["network"])
        network.load_state_dict(_float(load_file(folder / "network.safetensors")))
        return cls(MiniLMEncoder(config["network"]["text_seq_len"]), network.eval(), codec, config["network"])


def _float(state):
    return {name: tensor.float() for name, tensor in state.items()}
