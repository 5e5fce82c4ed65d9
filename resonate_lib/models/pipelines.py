"""Text-to-audio pipelines of `diffusers` as generators: AudioLDM, AudioLDM 2 and Stable Audio, latents in and audio out.

A pipeline's models are read from its folder, each by its own class, and put into three adapters with the interface of the
suite's own text encoder, network and codec (`pipeline_parts.py`), so whatever samples or trains a `Generator` takes these too.
The noise schedule is that of the pipeline's scheduler; the sampler is the suite's.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AudioLDM2UNet2DConditionModel, StableAudioDiTModel, UNet2DConditionModel
from torch import nn

from resonate_lib.diffusion import AngularDiffusion, Diffusion
from resonate_lib.models import storage
from resonate_lib.models.flux_audio import Condition
from resonate_lib.models.generator import Generator
from resonate_lib.models.pipeline_parts import (
    AudioLDM2Network,
    AudioLDM2Text,
    AudioLDMNetwork,
    AudioLDMText,
    MelVocoder,
    Oobleck,
    StableAudioNetwork,
    StableAudioText,
    read_model,
)
from resonate_lib.models.pretrained import PARTS, PIPELINES, load_strict, locate, pipeline_part

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}  # diffusers' names: ours
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def load_pipeline(source: str | Path, *, seconds: float | None = None, device=None) -> Generator:
    """The generator around a pipeline's folder or hub id, in float32; its `parts` say where it came from.

    seconds: of a clip; by default as long as the network was trained on. device: by default the GPU where there is one. Only
    safetensors are read, and no code that comes with the files is run. FileNotFoundError for a pipeline that is absent or not
    whole (`pretrained.locate`), ValueError for one of another class, damaged files, or a length that it cannot make.
    """
    found = locate(pipeline_part(source), source)
    named = _json(found.path / "model_index.json").get("_class_name")
    if named not in list(PIPELINES):
        raise ValueError(f"{found.path} is a {named}; allowed are {', '.join(PIPELINES)}: name the folder of one of those")
    kind = PIPELINES[named]
    text, network, codec = BUILD[kind](found.path, seconds)
    sizes = _json(found.path / ("transformer" if kind == "stable_audio" else "unet") / "config.json")
    config = {"pipeline": kind} | {name: value for name, value in sizes.items() if not name.startswith("_")}
    made = Generator(text, network, codec, config, {kind: replace(found, part=PARTS[kind])}, read_process(found.path))
    return made._on(device)


def load_saved(config: dict, weights: Path, source: str | Path | None = None, device=None) -> Generator:
    """What `Generator.save` wrote of a trained pipeline: its generator.json as `config`, its network.safetensors as `weights`.

    The rest is taken from `source` where that is a directory that holds the pipeline, else from where it lay when this was saved.
    """
    kind = config["network"]["pipeline"]
    saved, seconds = config["parts"][kind], config["codec"]["seconds"]
    places = [Path(source) / PARTS[kind].folder, Path(source)] if source else []
    here = [place for place in (*places, Path(saved["path"])) if (place / "model_index.json").is_file()]
    made = load_pipeline(here[0] if here else saved["source"].partition("@")[0], seconds=seconds, device=device)
    load_strict(made.network, storage.read(weights), str(weights))
    return made


# -------------------------------------------------------------------------------------------------- the three kinds
def _audioldm(folder: Path, seconds: float | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    text, unet = AudioLDMText(folder), read_model(UNet2DConditionModel, folder / "unet")
    codec = MelVocoder(folder, seconds, unet.config.sample_size)
    network = AudioLDMNetwork(unet, latent_dim=codec.latent_dim, empty=text([""]), scale=codec.scale)
    return text, network, codec


def _audioldm2(folder: Path, seconds: float | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    text, unet = AudioLDM2Text(folder), read_model(AudioLDM2UNet2DConditionModel, folder / "unet")
    codec = MelVocoder(folder, seconds, unet.config.sample_size)
    shared = {"latent_dim": codec.latent_dim, "empty": text([""]), "scale": codec.scale}
    return text, AudioLDM2Network(unet, new=text.new, widths=text.widths, **shared), codec


def _stable_audio(folder: Path, seconds: float | None) -> tuple[nn.Module, nn.Module, nn.Module]:
    transformer = read_model(StableAudioDiTModel, folder / "transformer")
    codec = Oobleck(folder, seconds, transformer.config.sample_size)
    text = StableAudioText(folder, codec.config["seconds"])
    nothing = Condition(*(torch.zeros_like(tensor) for tensor in text([""])))  # as in its training; not the empty prompt
    network = StableAudioNetwork(transformer, span=text.span, frames=codec.latent_len, latent_dim=codec.latent_dim, empty=nothing)
    return text, network, codec


BUILD = {"audioldm": _audioldm, "audioldm2": _audioldm2, "stable_audio": _stable_audio}


# -------------------------------------------------------------------------------------------------- the process
def read_process(folder: Path) -> Diffusion:
    """The diffusion process of the scheduler that lies in a pipeline's folder, whichever solver it names; ValueError where it has
    a property that `Diffusion` lacks."""
    config = {"prediction_type": "epsilon"} | _json(folder / "scheduler" / "scheduler_config.json")
    if "sigma_max" in config:
        allowed = {"sigma_data": [1.0], "sigma_schedule": ["exponential"], "final_sigmas_type": ["zero"],
                   "prediction_type": ["v_prediction"]}  # fmt: skip
    else:
        none = [None, False]
        allowed = {"clip_sample": none, "thresholding": none, "rescale_betas_zero_snr": none, "trained_betas": none,
                   "prediction_type": list(PREDICTIONS), "beta_schedule": list(SCHEDULES)}  # fmt: skip
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise ValueError(f"{folder / 'scheduler'}: {name}={config[name]!r}, known are {values}; use the scheduler it came with")
    prediction = PREDICTIONS[config["prediction_type"]]
    if "sigma_max" in config:
        return AngularDiffusion(prediction=prediction, sigma_min=config["sigma_min"], sigma_max=config["sigma_max"])
    return Diffusion(
        schedule=SCHEDULES[config["beta_schedule"]], prediction=prediction, train_steps=config["num_train_timesteps"],
        beta_start=config["beta_start"], beta_end=config["beta_end"], spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0), final_alpha_one=config.get("set_alpha_to_one", True), time_unit=1.0,
    )  # fmt: skip


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
