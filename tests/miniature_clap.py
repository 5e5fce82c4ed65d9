"""A miniature LAION-CLAP in the real file format: a RoBERTa folder and a training checkpoint of the package's classes.

Everything is small but what the package fixes: RoBERTa is 768 wide, the HTSAT takes 10 s at 48 kHz.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import RobertaConfig, RobertaModel

from resonate_lib.rewards.laion import clap_package

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
MERGES = ["a b", "Ġ a", "i n", "o g"]
HTSAT = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}


def make_roberta(folder: Path) -> RobertaConfig:
    """Writes config.json, vocab.json and merges.txt of a one-layer RoBERTa that knows every byte."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    config = RobertaConfig(
        vocab_size=len(pieces),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    config.save_pretrained(folder)
    return config


def make_clap(config: RobertaConfig, sizes: dict = HTSAT) -> torch.nn.Module:
    """The package's CLAP around a small HTSAT and a small RoBERTa, random weights, in evaluation mode."""
    package = clap_package()
    model_config = json.loads((Path(package.__file__).parent / "model_configs" / "HTSAT-base.json").read_text())
    held = package.model.create_htsat_model, package.model.RobertaModel
    try:
        package.model.create_htsat_model = lambda audio_cfg, *_: package.htsat.HTSAT_Swin_Transformer(
            num_classes=audio_cfg.class_num, config=audio_cfg, **sizes
        )
        package.model.RobertaModel = type("Built", (), {"from_pretrained": staticmethod(lambda _: RobertaModel(config))})
        model = package.model.CLAP(
            8 * sizes["embed_dim"], model_config["audio_cfg"], model_config["text_cfg"] | {"model_type": "roberta"}
        )
    finally:
        package.model.create_htsat_model, package.model.RobertaModel = held
    with torch.no_grad():  # as after training: different channels, and logarithms of mels in a sane range
        norm = model.audio_branch.bn0
        norm.running_mean.fill_(-40.0).add_(torch.randn(64))
        norm.running_var.fill_(400.0)
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "extractor" not in name:
                weight.normal_(std=1.0 if "embeddings" in name else weight[0].numel() ** -0.5)
    return model.eval()


def training_checkpoint(model: torch.nn.Module) -> dict:
    """What the package's trainer saves: parallel training's names, old position numbers, the optimizer, NumPy scalars."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    groups = [{"lr": np.float64(1e-4), "betas": (0.9, 0.98), "params": [0]}]
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": groups}
    arguments = argparse.Namespace(lr=1e-4, amodel="HTSAT-base")
    return {"epoch": 15, "name": "miniature", "args": arguments, "state_dict": state, "optimizer": optimizer}


def make_miniature(folder: Path, seed: int = 0) -> tuple[Path, Path, torch.nn.Module]:
    """Writes clap.pt and roberta/ into the folder; returns both paths and the model whose weights they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_clap(make_roberta(folder / "roberta"))
    torch.save(training_checkpoint(model), folder / "clap.pt")
    return folder / "clap.pt", folder / "roberta", model
