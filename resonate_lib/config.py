"""Every knob of the suite, one frozen dataclass per stage (speech: `config_speech`), and the profiles they are read from.

A value comes from the notebook's parameters cell (`-p`), else from `notebooks/params/<profile>.yaml`, else from the
default here. Values are checked whenever a dataclass is made, wherever it is made. Nothing here touches files other
than the profiles.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from resonate_lib.config_speech import RecognitionConfig, SpeakerConfig, SpeechConfig, SynthesisConfig
from resonate_lib.knobs import Config, field_types, knob, unknown

CHECKOUT = Path(__file__).resolve().parent.parent
MINUTES_KEYS = ("minutes", "minutes_own_base", "minutes_from_scratch")  # {notebook number: minutes}, for the first estimate

TRAINED = ("all", "attention", "lora")

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class SuiteConfig(Config):
    """What holds for the whole profile."""

    section: ClassVar[str] = "suite"
    world: str = knob("embedded", choices=("embedded", "folder"))  # synthetic scenes, or recordings with a caption file
    weights: str = "tiny"  # where models come from: a folder in resonate_lib/weights, a hub id or a local directory
    vae: str = ""  # published codec: a directory, file or hub id each; empty: in `weights`, else in the hub's cache
    vocoder: str = ""
    text: str = ""  # published text encoder, as vae
    sample_rate: int = knob(16000, low=8000, high=48000)  # Hz of the generator's audio
    seconds: float = knob(4.0, above=0, high=60)  # length of a clip
    disk_mb: int = knob(600, low=1)  # free space a run of this profile asks for before it starts
    preview_prompts: int = knob(4, low=1)  # clips made by notebook 00


@dataclass(frozen=True)
class DataConfig(Config):
    """Notebook 01: how large the corpus is, or where yours lies."""

    section: ClassVar[str] = "data"
    train_clips: int = knob(12000, low=4)
    validation_clips: int = knob(400, low=2)
    test_clips: int = knob(400, low=2)
    judge_clips: int = knob(8000, low=4)  # scenes of the independent judge; no other model hears them
    world_seed: int = knob(0, low=0)  # which event combinations are held out
    folder: str = ""  # your recordings; empty: the embedded world
    prompt_list: str = ""  # prompts to train on (jsonl, csv or tsv with `prompt`); empty: the training captions
    rl_prompts: int = knob(0, low=0)  # in a folder: at most so many training prompts; 0: all
    captions: str = ""  # caption file, in `folder` or elsewhere (csv, tsv or jsonl with audio_path or audio_id, and caption)


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Notebook 02: flow-matching pre-training of the base model."""

    section: ClassVar[str] = "pretrain"
    steps: int = knob(3000, low=1)  # optimizer steps
    batch_size: int = knob(64, low=1)  # clips a step
    learning_rate: float = knob(1e-3, above=0, high=1)
    weight_decay: float = knob(1e-6, low=0)
    eps: float = knob(1e-8, above=0, high=1e-2)  # of AdamW; published 1e-6
    warmup_steps: int = knob(100, low=0)  # linear, then the schedule
    caption_dropout: float = knob(0.1, low=0, high=0.9)  # share trained on the empty prompt, which guidance needs
    time_mean: float = knob(0.0, low=-3, high=3)  # of the logit-normal times; published 0, more is noisier
    hidden_dim: int = knob(160, low=8)
    depth: int = knob(5, low=2)  # all blocks
    fused_depth: int = knob(3, low=0)  # of them audio-only
    num_heads: int = knob(5, low=1)
    text_seq_len: int = knob(77, low=4, high=77)  # tokens a prompt may have; all are computed, so fewer are faster
    mlp_ratio: float = knob(2.0, above=0)  # published 4; 2 halves the time of a step at this width
    demo_steps: int = knob(40, low=1)  # of the demonstration where the base model is not trained anew
    continued_steps: int = knob(300, low=1)  # the row "base trained on": about the wall time of the longest online run
    continued_learning_rate: float = knob(1e-4, above=0, high=1)  # its first rate, which falls as in pre-training
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    micro_batch: int = knob(0, low=0)  # clips per forward and backward, gradients added up; 0: all of a step at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory

    def check(self) -> None:
        if self.fused_depth >= self.depth:
            raise ValueError(f"fused_depth={self.fused_depth}: must be below depth={self.depth}, which counts it in")
        if self.hidden_dim % (2 * self.num_heads):
            raise ValueError(f"hidden_dim={self.hidden_dim}: must be a multiple of 2 * num_heads={2 * self.num_heads}")


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """Notebook 08: the diffusion base model. Sizes, batches, rates and times are those of PretrainConfig."""

    section: ClassVar[str] = "diffusion"
    source: str = ""  # directory or hub id of a pipeline of diffusers in its place (AudioLDM, AudioLDM 2, Stable Audio)
    schedule: str = knob("cosine", choices=("cosine", "linear", "scaled_linear"))  # of the noise
    prediction: str = knob("v", choices=("v", "epsilon"))  # what the network answers
    steps: int = knob(6000, low=1)  # optimizer steps
    num_steps: int = knob(25, low=1, high=1000)  # denoising steps where its samplers are compared


@dataclass(frozen=True)
class RewardConfig(Config):
    """Notebook 02: training of the small reward models, and which published ones the larger profiles use."""

    section: ClassVar[str] = "reward"
    clap_steps: int = knob(1500, low=1)
    clap_batch_size: int = knob(64, low=2, why="contrastive learning needs another clip; use 2 or more")
    clap_learning_rate: float = knob(1e-3, above=0, high=1)
    lalm_steps: int = knob(2000, low=1)
    lalm_batch_size: int = knob(48, low=1)
    lalm_learning_rate: float = knob(1e-3, above=0, high=1)
    judge_steps: int = knob(1500, low=1)
    judge_batch_size: int = knob(64, low=1)
    judge_learning_rate: float = knob(1e-3, above=0, high=1)
    eval_clips: int = knob(400, low=4)  # held-out clips of the accuracy table
    codec_clips: int = knob(128, low=2)  # of them sent through the codec
    recall_draws: int = knob(1000, low=2)  # of the CLAP's recall@1 among 10 captions
    base_prompts: int = knob(200, low=2)  # held-out prompts the base model is measured on
    clap_source: str = "shipped"  # or a file, directory or hub id of a LAION-CLAP checkpoint
    lalm_source: str = "shipped"  # or a directory or hub id of an audio language model, or a server (http://host:port/v1#model)
    clap_eval_source: str = "shipped"  # as above, of the judges that no training hears; empty: not measured
    lalm_eval_source: str = "shipped"
    clap_published_rate: bool = False  # true as published: the reward's CLAP takes 44,100 Hz for 44,000 Hz
    roberta_source: str = "roberta-base"  # directory or hub id: the tokenizer of LAION-CLAP
    aesthetics_source: str = ""  # directory or hub id of AudioBox-Aesthetics; empty: not measured
    msclap_source: str = ""  # file, directory or hub id of MS-CLAP 2023, TTA-Bench's CLAP score; empty: not measured
    gpt2_source: str = "openai-community/gpt2"  # directory or hub id: the tokenizer of MS-CLAP
    lalm_quantisation: str = knob("", choices=("", "8bit", "4bit"))  # of the published judges, by bitsandbytes
    lalm_offload: bool = False  # spread them over GPU, memory and disk
    lalm_fallback: str = knob("sigmoid", choices=("sigmoid", "zero"))  # zero: the published rule where neither is answered


@dataclass(frozen=True)
class DPOConfig(Config):
    """Notebook 03: offline preference pairs and flow-DPO."""

    section: ClassVar[str] = "dpo"
    pairs: int = knob(384, low=1)  # pairs made by the frozen reference before ties are dropped
    steps: int = knob(150, low=1)  # optimizer steps
    fresh_every: int = knob(0, low=0)  # steps after which the reference makes new pairs; 0: one set for all. Published: 2
    batch_size: int = knob(32, low=1)  # pairs a step
    num_steps: int = knob(25, low=1, high=1000)  # Euler steps per clip
    guidance_scale: float = knob(1.0, low=0, high=20)
    beta: float = knob(100.0, above=0)  # how far the preference may pull from the reference; larger stays closer
    learning_rate: float = knob(1e-4, above=0, high=1)
    trained: str = knob("all", choices=TRAINED)  # as for GRPO; published: all
    lora_rank: int = knob(32, low=1)
    lora_alpha: float = knob(64.0, above=0)
    sft_weight: float = knob(0.0, low=0)  # weight of the winner's flow loss (the CRPO term)
    decode_iterations: int = knob(8, low=1, high=1000)  # phase-reconstruction rounds for the reward's ear
    unnormalise: bool = True  # latents before decoding; false repeats the published code, which forgot
    max_grad_norm: float = knob(1.0, above=0)
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    sample_batch: int = knob(0, low=0)  # clips sampled, decoded and heard at once; 0: all of a batch
    micro_batch: int = knob(0, low=0)  # clips per forward and backward (a pair is two), gradients added up; 0: all at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory
    reward: str = "lalm"  # reward spec: `clap`, `lalm`, `lalm_fine`, a weighted mix, or module:function

    @property
    def rounds(self) -> int:
        """How often pairs are made."""
        return -(-self.steps // self.fresh_every) if self.fresh_every else 1

    def check(self) -> None:
        if self.micro_batch == 1:
            raise ValueError("micro_batch=1: a pair is two clips; use 2 or more, or 0 for all at once")


@dataclass(frozen=True)
class GRPOConfig(Config):
    """Notebooks 04 and 05: online Flow-GRPO on sampled trajectories."""

    section: ClassVar[str] = "grpo"
    steps: int = knob(30, low=1)  # rounds of sampling and updating
    prompts_per_step: int = knob(16, low=1)
    group_size: int = knob(12, low=2, why="a group of one has no advantage; use 2 or more")  # clips per prompt
    num_steps: int = knob(10, low=2, high=1000)  # of the sampler, per clip
    guidance_scales: tuple[float, ...] = knob((1.0,), low=0, high=20)  # in sampling and training, by round in turn
    noise_level: float = knob(0.7, above=0, high=2)  # exploration; for kind cps at most 1
    kind: str = knob("sde", choices=("sde", "cps"))
    last_step_noise: bool = False  # true as published: noise in the last step too, which is heard and never trained
    timestep_fraction: float = knob(0.99, above=0, high=1)  # share of the steps trained, counted from noise
    window: int = knob(0, low=0)  # stochastic steps a clip, from a random one on, siblings alike before; 0: all steps
    learning_rate: float = knob(1e-4, above=0, high=1)
    trained: str = knob("all", choices=TRAINED)  # which weights, see `online.learning`; published: all
    lora_rank: int = knob(32, low=1)  # of trained=lora; Flow-GRPO: 32
    lora_alpha: float = knob(64.0, above=0)  # its additions count alpha / rank; Flow-GRPO: 64
    warmup_steps: int = knob(0, low=0)  # rounds until the learning rate is reached, linearly; published: 0
    clip_range: float = knob(1e-4, above=0, high=1)  # log-probs are means over dimensions, hence so small
    adv_clip: float = knob(5.0, above=0)
    beta: float = knob(0.004, low=0)  # KL weight; 0.04 with kl=paper is 0.004 with kl=exact at ten steps
    kl: str = knob("exact", choices=("exact", "paper"))
    global_std: bool = True  # deviation over all clips of a step instead of each group's own
    minibatches: int = knob(2, low=1)  # optimizer steps per round
    ema: float = knob(0.0, low=0, high=1)  # of the weights that training ends with, per round; 0: the last ones
    max_grad_norm: float = knob(1.0, above=0)
    decode_iterations: int = knob(8, low=1, high=1000)
    unnormalise: bool = True  # as for DPO
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    sample_batch: int = knob(0, low=0)  # clips sampled, decoded and heard at once; 0: all of a round
    micro_batch: int = knob(0, low=0)  # clips per forward and backward, gradients added up; 0: all at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory
    watch_every: int = knob(0, low=0)  # rounds between two looks of the watch, in whole turns of the guidances; 0: no watch
    reward: str = "clap"

    @property
    def trainable_steps(self) -> int:
        """How many of the first steps may be trained; the last is deterministic."""
        return min(int(self.num_steps * self.timestep_fraction), self.num_steps - 1)

    def check(self) -> None:
        if self.kind == "cps" and self.noise_level > 1:
            raise ValueError(f"noise_level={self.noise_level}: at most 1 with kind=cps")
        _check_no_clip_alone(self)
        _check_minibatches(self.minibatches, self.prompts_per_step * self.group_size)
        _check_some_step(self)


@dataclass(frozen=True)
class NFTConfig(Config):
    """Notebook 04: the forward-process variant (DiffusionNFT), no trajectories."""

    section: ClassVar[str] = "nft"
    steps: int = knob(40, low=1)
    prompts_per_step: int = knob(8, low=1)
    group_size: int = knob(16, low=2, why="a group of one has no advantage; use 2 or more")
    num_steps: int = knob(10, low=1, high=1000)  # Euler steps per clip
    guidance_scales: tuple[float, ...] = knob((1.0,), low=0, high=20)  # of the sampling, by round in turn
    learning_rate: float = knob(3e-4, above=0, high=1)
    trained: str = knob("all", choices=TRAINED)  # as for GRPO; published: lora
    lora_rank: int = knob(32, low=1)
    lora_alpha: float = knob(64.0, above=0)
    warmup_steps: int = knob(0, low=0)  # as for GRPO
    b: float = knob(1.0, above=0, high=1)  # strength of the implicit policies
    beta_kl: float = knob(1e-4, low=0)
    adv_clip: float = knob(5.0, above=0)
    global_std: bool = True
    times_per_sample: int = knob(2, low=1)  # training times drawn per clip
    timestep_fraction: float = knob(1.0, above=0, high=1)  # share of the times trained, counted from noise
    minibatches: int = knob(2, low=1)
    decay: str = knob(
        "linear", choices=("none", "linear", "late")
    )  # of the old policy: 0 | min(0.001 s, 0.5) | after 75
    ema: float = knob(0.9, low=0, high=1)  # as for GRPO; published: EMA 0.9
    max_grad_norm: float = knob(1.0, above=0)
    decode_iterations: int = knob(8, low=1, high=1000)
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    sample_batch: int = knob(0, low=0)  # clips sampled, decoded and heard at once; 0: all of a round
    micro_batch: int = knob(0, low=0)  # clips per forward and backward, gradients added up; 0: all at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory
    watch_every: int = knob(0, low=0)  # rounds between two looks of the watch, in whole turns of the guidances; 0: no watch
    reward: str = "clap"

    def check(self) -> None:
        _check_minibatches(self.minibatches, self.prompts_per_step, "prompts")
        trained = int(self.num_steps * self.timestep_fraction)
        if self.times_per_sample > trained:
            raise ValueError(
                f"times_per_sample={self.times_per_sample}: timestep_fraction={self.timestep_fraction} of "
                f"{self.num_steps} steps leaves {trained} times to train; ask for fewer or raise one of the two"
            )


@dataclass(frozen=True)
class DiffROConfig(Config):
    """Notebook 05: the reward's own gradient through the last steps of sampling (DRaFT, DiffRO)."""

    section: ClassVar[str] = "diffro"
    steps: int = knob(20, low=0)  # rounds, each with one update; 0: not trained
    prompts_per_step: int = knob(32, low=1)  # clips a round, one a prompt: no clip is compared with another
    num_steps: int = knob(10, low=1, high=1000)  # Euler steps per clip
    last_steps: int = knob(1, low=1)  # of them with a gradient; published: 1, or all
    guidance_scales: tuple[float, ...] = knob((1.0,), low=0, high=20)  # as for GRPO
    learning_rate: float = knob(1e-4, above=0, high=1)
    trained: str = knob("all", choices=TRAINED)  # as for GRPO; published: lora
    lora_rank: int = knob(32, low=1)
    lora_alpha: float = knob(64.0, above=0)
    warmup_steps: int = knob(0, low=0)  # as for GRPO
    beta: float = knob(0.0, low=0)  # weight of the mean squared velocity difference to the start
    ema: float = knob(0.0, low=0, high=1)  # as for GRPO
    slope_limit: float = knob(1.5, low=0)  # most that a clip's gradient may measure, in medians over micro_batch; 0: no limit
    max_grad_norm: float = knob(1.0, above=0)
    decode_iterations: int = knob(2, low=1, high=1000)
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    sample_batch: int = knob(0, low=0)  # clips decoded and heard at once, with the graph of codec and reward; 0: all of micro_batch
    micro_batch: int = knob(0, low=0)  # clips sampled, forward and backward, gradients added up; 0: all at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory
    watch_every: int = knob(0, low=0)  # rounds between two looks of the watch, in whole turns of the guidances; 0: no watch
    reward: str = "clap"  # must have a gradient: clap, lalm or a sum of the two

    def check(self) -> None:
        if self.last_steps > self.num_steps:
            raise ValueError(f"last_steps={self.last_steps}: the sampler takes {self.num_steps} steps; use as many or fewer")


@dataclass(frozen=True)
class PPOConfig(Config):
    """Notebook 08: PPO on the denoising steps of a diffusion generator."""

    section: ClassVar[str] = "ppo"
    steps: int = knob(20, low=1)  # rounds of sampling and updating
    prompts_per_step: int = knob(16, low=1)
    group_size: int = knob(12, low=1)  # clips per prompt; 1 needs a critic
    num_steps: int = knob(10, low=2, high=1000)  # of the sampler, per clip
    eta: float = knob(1.0, above=0, high=1)  # share of the schedule's own noise, which is all the exploration there is
    kind: str = knob("ddim", choices=("ddim", "ancestral"))
    guidance_scales: tuple[float, ...] = knob((1.0,), low=0, high=20)  # as for GRPO
    timestep_fraction: float = knob(1.0, above=0, high=1)  # share of the steps trained, counted from noise
    window: int = knob(0, low=0)  # as for GRPO
    learning_rate: float = knob(3e-4, above=0, high=1)
    critic_learning_rate: float = knob(1e-3, above=0, high=1)
    critic_epochs: int = knob(8, low=1)  # passes of the critic over a round; it is small, and has far to go
    trained: str = knob("all", choices=TRAINED)  # as for GRPO
    lora_rank: int = knob(32, low=1)
    lora_alpha: float = knob(64.0, above=0)
    warmup_steps: int = knob(0, low=0)  # as for GRPO
    clip_range: float = knob(2e-4, above=0, high=1)  # log-probs are means over dimensions, hence so small
    adv_clip: float = knob(5.0, above=0)
    beta: float = knob(0.004, low=0)  # KL weight, exact: nats per dimension and step
    epochs: int = knob(2, low=1)  # passes of the policy over a round
    minibatches: int = knob(2, low=1)  # optimizer steps per pass
    target_kl: float = knob(1e-3, low=0)  # the passes end where the policy is so far from the one that sampled; 0: never
    gamma: float = knob(1.0, low=0, high=1)  # 1: the reward at the end counts alike at every step
    lam: float = knob(0.95, low=0, high=1)  # 1: the reward that came; less: what the critic thinks of the states in between
    advantage: str = knob("gae", choices=("gae", "prompt"))  # a critic's, or against the clips of one prompt
    ema: float = knob(0.9, low=0, high=1)  # as for GRPO
    max_grad_norm: float = knob(1.0, above=0)
    decode_iterations: int = knob(8, low=1, high=1000)
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))
    sample_batch: int = knob(0, low=0)  # clips sampled, decoded and heard at once; 0: all of a round
    micro_batch: int = knob(0, low=0)  # clips per forward and backward, gradients added up; 0: all at once
    checkpointing: bool = False  # compute blocks again in the backward pass: a third more time, far less memory
    watch_every: int = knob(0, low=0)  # rounds between two looks of the watch, in whole turns of the guidances; 0: no watch
    reward: str = "clap"

    @property
    def trainable_steps(self) -> int:
        """How many of the first steps may be trained, never the last (`ppo.trained_steps`)."""
        return min(int(self.num_steps * self.timestep_fraction), self.num_steps - 1)

    def check(self) -> None:
        if self.advantage == "prompt" and self.group_size == 1:
            raise ValueError("group_size=1: advantage=prompt compares clips of one prompt; use 2 or more, or advantage=gae")
        if self.kind == "ancestral" and self.eta != 1:
            raise ValueError(f"eta={self.eta}: ancestral sampling has the schedule's whole noise; use 1, or kind=ddim")
        _check_no_clip_alone(self)
        _check_minibatches(self.minibatches, self.prompts_per_step * self.group_size)
        _check_some_step(self)


@dataclass(frozen=True)
class EvalConfig(Config):
    """Notebook 06: the benchmark."""

    section: ClassVar[str] = "eval"
    prompts: int = knob(128, low=2)  # held-out test prompts
    samples_per_prompt: int = knob(2, low=1)
    num_steps: int = knob(25, low=1, high=1000)
    guidance: tuple[float, ...] = knob((1.0,), low=0, high=20)  # all systems are compared at each of these, and at their own best
    guidance_scales: tuple[float, ...] = knob((1.0, 2.0, 3.0), low=0, high=20)  # of which the best is picked, on validation
    validation_prompts: int = knob(48, low=2)
    best_of: int = knob(4, low=1)  # clips per prompt in the best-of row
    part_prompts: int = knob(20, low=2)  # prompts of each other part (tiny: generalization, robustness; TTA-Bench: five)
    decode_iterations: int = knob(16, low=1, high=1000)  # phase-reconstruction rounds for the judges' ears
    bootstrap: int = knob(2000, low=100)  # resamples of the 95 % interval
    batch_size: int = knob(32, low=1)
    tta_bench: str = ""  # folder with the published benchmark's files; empty: the embedded one

    def check(self) -> None:
        if self.guidance[:1] != (1.0,) or len(set(self.guidance)) < len(self.guidance):
            raise ValueError(f"guidance={self.guidance}: begin with 1, which the figures show, and name each once, such as 1,4.5")


@dataclass(frozen=True)
class ListenConfig(Config):
    """Notebook 07: what is listened to."""

    section: ClassVar[str] = "listen"
    prompts: int = knob(8, low=1)
    num_steps: int = knob(25, low=1, high=1000)
    guidance_scale: float = knob(1.0, low=0, high=20)
    decode_iterations: int = knob(60, low=1, high=1000)
    loudness: str = knob("common_gain", choices=("common_gain", "bs1770"))
    trials: int = knob(8, low=1)  # of the blind test


CONFIGS: tuple[type[Config], ...] = (
    SuiteConfig,
    DataConfig,
    PretrainConfig,
    DiffusionConfig,
    RewardConfig,
    DPOConfig,
    GRPOConfig,
    NFTConfig,
    DiffROConfig,
    PPOConfig,
    EvalConfig,
    ListenConfig,
    SpeechConfig,
    RecognitionConfig,
    SpeakerConfig,
    SynthesisConfig,
)
SECTIONS: dict[str, type[Config]] = {cls.section: cls for cls in CONFIGS}

# Which dataclasses a notebook resolves, main one first: the runner checks `-p name value` against them before a
# kernel starts.
NOTEBOOK_CONFIGS: dict[str, tuple[type[Config], ...]] = {
    "00": (SuiteConfig, ListenConfig),
    "01": (DataConfig,),
    "02": (PretrainConfig, RewardConfig),
    "03": (DPOConfig,),
    "04": (GRPOConfig, NFTConfig),
    "05": (GRPOConfig, DiffROConfig, RewardConfig),
    "06": (EvalConfig,),
    "07": (ListenConfig,),
    "08": (PPOConfig, DiffusionConfig),
    "09": (RecognitionConfig, SpeechConfig),
    "10": (SynthesisConfig, SpeakerConfig, SpeechConfig),
}


def resolve(cls: type[C], profile: str = "tiny", *, params_dir: str | os.PathLike | None = None, **overrides: Any) -> C:
    """Build `cls` from overrides that are not None, over the profile's section, over the defaults.

    Raises ValueError in one line for an unknown profile or name (with the nearest match) and for a value out of range.
    """
    names = list(field_types(cls))
    for name in overrides:
        if name not in names:
            raise ValueError(unknown("parameter", name, names))
    values = dict(load_profile(profile, params_dir).get(cls.section, {}))
    values.update({name: value for name, value in overrides.items() if value is not None})
    return cls(**values)


def load_profile(name: str, params_dir: str | os.PathLike | None = None) -> dict[str, Any]:
    """Read and check `params/<name>.yaml`: {section: {field: value}} and the tables of minutes.

    params_dir: default `RESONATE_PARAMS`, else `notebooks/params` of the checkout. Raises ValueError for an unknown
    profile, section or field, and for any value that its dataclass refuses.
    """
    folder = Path(params_dir or os.environ.get("RESONATE_PARAMS") or CHECKOUT / "notebooks" / "params")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        if not known:
            raise ValueError(f"no profiles in {folder}: run from a checkout of the suite, or set RESONATE_PARAMS")
        raise ValueError(unknown("profile", str(name), known))
    path = folder / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML ({' '.join(str(error).split())}); correct the file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: holds {type(content).__name__}; expected sections such as `grpo:`")
    for section, values in content.items():
        _check_section(path.name, str(section), values)
    return content


def resolve_all(profile: str, params_dir: str | os.PathLike | None = None) -> dict[str, dict[str, Any]]:
    """Every section of a profile with every value filled in: {section: {field: value}}, ready for YAML and for
    hashing."""
    return {section: plain(resolve(cls, profile, params_dir=params_dir)) for section, cls in SECTIONS.items()}


def plain(config: Config) -> dict[str, Any]:
    """The fields as plain YAML values (tuples become lists)."""
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()
    }


def _check_minibatches(minibatches: int, parts: int, what: str = "clips") -> None:
    if minibatches > parts:
        raise ValueError(f"minibatches={minibatches}: more than the {parts} {what} of a step; use fewer, or more {what}")


def _check_no_clip_alone(config: GRPOConfig | PPOConfig) -> None:
    for name in ("sample_batch", "micro_batch"):
        if getattr(config, name) == 1:
            raise ValueError(
                f"{name}=1: a clip alone is computed by other kernels, so its first ratio is off by more than the "
                "clip_range; use 2 or more, or 0 for all at once"
            )


def _check_some_step(config: GRPOConfig | PPOConfig) -> None:
    trained = config.trainable_steps
    if trained < 1:
        raise ValueError(
            f"timestep_fraction={config.timestep_fraction}: trains none of {config.num_steps} steps; "
            f"use {1 / config.num_steps:g} or more"
        )
    if config.window > trained:
        raise ValueError(
            f"window={config.window}: timestep_fraction={config.timestep_fraction} of {config.num_steps} steps leaves "
            f"{trained} to train; use {trained} or fewer, or 0 for all"
        )


def _check_section(file: str, section: str, values: Any) -> None:
    if section not in SECTIONS and section not in MINUTES_KEYS:
        raise ValueError(f"{file}: {unknown('section', section, [*SECTIONS, *MINUTES_KEYS])}")
    if not isinstance(values, dict):
        raise ValueError(f"{file}: section {section} holds {type(values).__name__}; expected `name: value` lines")
    if section in MINUTES_KEYS:
        return
    for name in values:
        if name not in field_types(SECTIONS[section]):
            raise ValueError(
                f"{file}: {unknown(f'{section} parameter', str(name), list(field_types(SECTIONS[section])))}"
            )
    try:
        SECTIONS[section](**values)
    except ValueError as error:
        raise ValueError(f"{file}: {section}: {error}") from None


def derived(config: Config) -> str:
    """The batch arithmetic that follows from a config, one fact a line; empty where nothing follows."""
    if isinstance(config, (GRPOConfig, NFTConfig, PPOConfig)):
        clips = config.prompts_per_step * config.group_size
        epochs = config.epochs if isinstance(config, PPOConfig) else 1
        passes = f" x {epochs} epochs at most" if epochs > 1 else ""
        lines = [
            f"clips per step   = {config.prompts_per_step} prompts x {config.group_size} = {clips}",
            f"clips per update = {clips} / {config.minibatches} minibatches = about {clips / config.minibatches:g}",
            f"clips in all     = {config.steps} steps x {clips} = {config.steps * clips}",
            f"updates in all   = {config.steps} x {config.minibatches}{passes} = {config.steps * config.minibatches * epochs}",
        ]
        if isinstance(config, (GRPOConfig, PPOConfig)):
            trained = config.window or config.trainable_steps
            lines.append(f"steps trained    = {trained} of {config.num_steps} per clip")
        return "\n".join(lines)
    if isinstance(config, DiffROConfig):
        clips = config.steps * config.prompts_per_step
        return (
            f"clips in all     = {config.steps} rounds x {config.prompts_per_step} prompts = {clips}\n"
            f"with a gradient  = the last {config.last_steps} of {config.num_steps} steps"
        )
    if isinstance(config, DPOConfig):
        epochs = config.steps * config.batch_size / (config.pairs * config.rounds)
        times = f" x {config.rounds} rounds" if config.rounds > 1 else ""
        return (
            f"clips generated  = 2 x {config.pairs} pairs{times} = {2 * config.pairs * config.rounds}\n"
            f"passes over pairs = {config.steps} steps x {config.batch_size} / {config.pairs} = {epochs:.1f}"
        )
    if isinstance(config, EvalConfig):
        clips = config.prompts * config.samples_per_prompt
        return f"clips per row    = {config.prompts} prompts x {config.samples_per_prompt} = {clips}"
    if isinstance(config, PretrainConfig):
        return f"clips seen       = {config.steps} steps x {config.batch_size} = {config.steps * config.batch_size}"
    return ""
