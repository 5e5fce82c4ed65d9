"""Miniatures of the published models: real classes, real file formats and names, random weights; built on the spot.

`build(folder)` lays them out as a directory of weights: the files of the generator, VAE and vocoder beside each other, FLAN-T5
in a folder of its own. Everything is a function of the seeds written here.
"""

import json
from pathlib import Path

import torch

from resonate_lib.models.bigvgan import BigVGAN
from resonate_lib.models.flux_audio import FluxAudio
from resonate_lib.models.pretrained import PARTS
from resonate_lib.models.vae import MelVAE

LATENT, TEXT = 6, 32
FLUX = dict(latent_dim=LATENT, text_dim=TEXT, text_c_dim=TEXT, hidden_dim=32, depth=3, fused_depth=1, num_heads=2,
            latent_seq_len=430, text_seq_len=77)
VOCODER_16K = dict(num_mels=80, upsample_rates=[4, 4, 2, 2, 2, 2], upsample_kernel_sizes=[8, 8, 4, 4, 4, 4], use_tanh_at_final=True)
VOCODER = dict(
    resblock="1", num_mels=128, upsample_rates=[8, 4, 2, 2, 2, 2], upsample_kernel_sizes=[16, 8, 4, 4, 4, 4],
    upsample_initial_channel=64, resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], activation="snakebeta",
    snake_logscale=True, use_bias_at_final=False, use_tanh_at_final=False, num_gpus=0, batch_size=4, sampling_rate=44100)


def noise(module: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Random values where a network starts at zero, so that everything takes part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def seeded(build, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def flux(path: Path, **overrides) -> FluxAudio:
    """A generator's checkpoint under the official names, with the buffers that some official files still carry."""
    statistics = dict(latent_mean=torch.linspace(-1, 1, LATENT), latent_std=torch.linspace(1.5, 3, LATENT))
    network = noise(seeded(lambda: FluxAudio(**{**FLUX, **statistics, **overrides}), 1), 2)
    stray = {"t_embed.freqs": torch.zeros(128), "latent_rot": torch.zeros(1, 4, 8, 2, 2), "text_rot": torch.zeros(1, 4, 8, 2, 2)}
    torch.save(network.state_dict() | stray, path)
    return network


def vae(path: Path, mode: str = "44k") -> MelVAE:
    """The autoencoder as its checkpoint stores it, before `remove_weight_norm`."""
    network = noise(seeded(lambda: MelVAE(mode, embed_dim=LATENT, hidden_dim=16), 3), 4)
    torch.save(network.state_dict(), path)
    return network


def vocoder(folder: Path, name: str = "bigvgan_generator.pt", **overrides) -> BigVGAN:
    """The vocoder's file: {"generator": tensors with weight-norm pairs}, and its config.json beside it."""
    network = noise(seeded(lambda: BigVGAN(VOCODER | overrides), 5), 6)
    state = {}
    for key, tensor in network.state_dict().items():
        if key.endswith(".weight") and tensor.dim() == 3:
            norm = torch.linalg.vector_norm(tensor, dim=(1, 2), keepdim=True)
            state |= {f"{key}_g": norm, f"{key}_v": 3 * tensor / norm}  # the direction's own length does not matter
        else:
            state[key] = tensor
    torch.save({"generator": state}, folder / name)
    (folder / "config.json").write_text(json.dumps(VOCODER | overrides))
    return network


def t5(folder: Path):
    """A FLAN-T5 folder, encoder and decoder as on the hub: gated GELU, untied output, a Unigram tokenizer of letters and words."""
    from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

    words = [f"▁{word}" for word in ("a", "dog", "bark", "rain", "fall", "car", "horn", "bird", "and", "followed", "by", "then")]
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.'-", *words]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((piece, -20.0 / (1 + len(piece))) for piece in pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=8)
    tokenizer.save_pretrained(folder)
    config = T5Config(vocab_size=len(tokenizer) + 5, d_model=TEXT, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = seeded(lambda: T5ForConditionalGeneration(config), 7).eval()
    model.save_pretrained(folder)
    return model


def build(folder: Path) -> Path:
    """A directory of weights: Resonate_PT.pth, v1-44.pth, bigvgan_generator.pt and config.json, flan-t5-large/."""
    folder.mkdir(parents=True, exist_ok=True)
    flux(folder / PARTS["generator_pt"].file)
    vae(folder / Path(PARTS["vae_44k"].file).name)
    vocoder(folder)
    t5(folder / PARTS["t5"].folder)
    return folder
