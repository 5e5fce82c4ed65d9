"""A miniature MS-CLAP in the real file format, and what its package itself makes of sounds; run by the environment's own Python:

    python miniature_msclap.py make FOLDER      # CLAP_weights_2023.pth, and GPT-2 in a folder whose place it prints
    python miniature_msclap.py direct FOLDER    # reads FOLDER/asked.json, prints the scores as JSON

Of the real classes only GPT-2 is smaller, in layers and vocabulary: the package fixes the HTSAT and all widths.
"""

import json
import os
import random
import sys
from pathlib import Path

import soundfile
import torch
import yaml
from msclap import CLAP as Wrapper
from msclap import CLAPWrapper as package
from msclap.models.clap import CLAP
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2Model

MERGES = ["a b", "Ġ a", "i n", "o g"]


def gpt2(folder: Path) -> None:
    """GPT-2 of one layer that knows every byte; "!" is its first token and <|endoftext|> its last, as in the real one."""
    folder.mkdir(parents=True)
    pieces = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    end = len(pieces) - 1
    GPT2Model(GPT2Config(vocab_size=len(pieces), n_layer=1, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)


def make(folder: Path) -> str:
    """Random weights, the batch norm as after training, and a constant that files of older transformers hold."""
    torch.manual_seed(0)
    settings = yaml.safe_load((Path(package.__file__).parent / "configs" / "config_2023.yml").read_text())
    gpt2(folder / settings["text_model"])
    names = ("audioenc_name", "window_size", "hop_size", "mel_bins", "fmin", "fmax", "out_emb", "transformer_embed_dim", "d_proj")
    model = CLAP(**{name: settings[name] for name in names}, sample_rate=settings["sampling_rate"],
                 classes_num=settings["num_classes"], text_model=settings["text_model"])  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "extractor" not in name:
                weight.normal_(std=1.0 if ".wte" in name else weight[0].numel() ** -0.5)
        norm = model.audio_encoder.base.htsat.bn0
        norm.running_mean.fill_(-40.0).add_(torch.randn(64))
        norm.running_var.fill_(400.0)
    state = model.state_dict() | {"caption_encoder.base.h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save({"model": state, "epoch": 3}, folder / "CLAP_weights_2023.pth")
    return settings["text_model"]


def direct(folder: Path) -> list[float]:
    """As TTA-Bench's tool scores: one file and one prompt at a time; `start` stands in for the package's random place."""

    def load(path):  # torchaudio's needs torchcodec
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(audio.T), rate

    package.torchaudio.load = load
    wrapper, scores = Wrapper(folder / "CLAP_weights_2023.pth", version="2023"), []
    for asked in json.loads((folder / "asked.json").read_text()):
        random.randrange = lambda _, start=asked["start"]: start
        sound = wrapper.get_audio_embeddings([asked["path"]])
        text = wrapper.get_text_embeddings([asked["prompt"]])
        scores.append(torch.nn.functional.cosine_similarity(sound, text).item())
    return scores


if __name__ == "__main__":
    os.chdir(sys.argv[2])  # the package asks for GPT-2 by its hub id, and finds the folder of that name
    found = {"make": make, "direct": direct}[sys.argv[1]](Path.cwd())
    print(json.dumps(found))
