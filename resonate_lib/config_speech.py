"""The knobs of notebooks 09 and 10: what speech is made of, recognition, synthesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resonate_lib.knobs import Config, knob


@dataclass(frozen=True)
class SpeechConfig(Config):
    """Notebooks 09 and 10: the spoken corpus."""

    section: ClassVar[str] = "speech"
    train_utterances: int = knob(6000, low=4)
    test_utterances: int = knob(400, low=2)
    speech_folder: str = ""  # recordings in LibriSpeech's folders, or a caption file with audio_path and text; empty: espeak-ng
    longest: float = knob(10.0, above=0, high=30)  # seconds; longer recordings of `speech_folder` are left out


@dataclass(frozen=True)
class RecognitionConfig(Config):
    """Notebook 09: reinforcement of an audio language model that writes down what it hears."""

    section: ClassVar[str] = "recognition"
    source: str = ""  # a published Qwen2-Audio (hub id or directory); empty: the small recogniser, shipped or trained here
    rollout_source: str = ""  # an engine that samples, http://host:port/v1#model; empty: the policy itself
    objective: str = knob("grpo", choices=("grpo", "mwer"))
    steps: int = knob(40, low=1)  # rounds of sampling hypotheses and updating
    utterances_per_step: int = knob(24, low=1)
    group_size: int = knob(8, low=2, why="a group of one has no advantage; use 2 or more")  # hypotheses of an utterance
    max_new_tokens: int = knob(48, low=1)  # of a hypothesis; one that has not ended by then is cut off
    temperature: float = knob(1.0, above=0, high=2)  # of the sampling, and of the policy whose probabilities are trained
    top_p: float = knob(1.0, above=0, high=1)  # below 1 samples come from a part of what they are scored under: a small bias
    reward: str = "wer+0.5*keyword-0.5*hallucination-0.5*insertion"  # rules of rewards/rules.py
    global_std: bool = False  # advantages over the deviation of all hypotheses of a round, else of their group
    learning_rate: float = knob(1e-4, above=0, high=1)
    warmup_steps: int = knob(3, low=0)  # rounds over which the rate rises
    epochs: int = knob(2, low=1)  # updates of a round, each over all of its hypotheses
    clip_range: float = knob(0.2, above=0, high=1)  # of the ratio of one token's probabilities
    beta: float = knob(0.02, low=0)  # weight of the KL to the supervised start, nats a token
    ce_weight: float = knob(0.2, low=0)  # mwer: of the reference's log-likelihood; published 0.01, with N-best lists of a beam
    trained: str = knob("all", choices=("all", "lora"))
    lora_rank: int = knob(16, low=1)
    lora_alpha: float = knob(32.0, above=0)
    max_grad_norm: float = knob(1.0, above=0)
    micro_batch: int = knob(0, low=0)  # utterances computed at once, of like length; 0: all of a round
    precision: str = knob("float32", choices=("float32", "bf16"))
    data: str = knob("middle_long", choices=("random", "hard", "middle", "middle_long"))  # which utterances are trained on
    probe_utterances: int = knob(600, low=2)  # utterances whose pass rate is measured before
    probe_samples: int = knob(4, low=2)  # hypotheses of each
    chosen: int = knob(200, low=1)  # utterances that the trained choice keeps
    choice_steps: int = knob(10, low=1)  # rounds of each choice in their comparison
    compared: int = knob(0, low=0)  # utterances of each choice there, the fewer the more they differ; 0: as many as chosen
    eval_silence: int = knob(120, low=2)  # silent and noisy clips
    eval_long: int = knob(120, low=2)  # long utterances
    bootstrap: int = knob(2000, low=100)  # resamples of the 95 % interval
    supervised_steps: int = knob(3500, low=1)  # of a start that is trained here; 2,000: half the words of long audio wrong
    supervised_batch_size: int = knob(32, low=1)
    supervised_learning_rate: float = knob(2e-3, above=0, high=1)
    supervised_kinds: tuple[str, ...] = ("command", "number", "name", "rare", "long")  # of the corpus; silences are few:
    supervised_silences: int = knob(6, low=0)  # enough that an empty transcript is ever sampled, for RL to make more of it

    def check(self) -> None:
        for name, kept in (("chosen", self.chosen), ("compared", self.compared or self.chosen)):
            if self.utterances_per_step > kept:
                raise ValueError(f"utterances_per_step={self.utterances_per_step}: a choice keeps {name}={kept}; use fewer, or "
                                 "keep more")
            if kept > self.probe_utterances:
                raise ValueError(f"{name}={kept}: only probe_utterances={self.probe_utterances} are probed; keep fewer")


@dataclass(frozen=True)
class SpeakerConfig(Config):
    """Notebook 10: the supervised start of the speaker and what reads its tokens, where they are trained here."""

    section: ClassVar[str] = "speaker"
    train_lines: int = knob(6000, low=8)  # spoken by espeak-ng
    tokenizer_steps: int = knob(1500, low=1)
    tokenizer_batch_size: int = knob(32, low=1)
    codes: int = knob(1024, low=2, high=65536)  # of the codebook
    steps: int = knob(1500, low=1)  # of the language model
    batch_size: int = knob(32, low=1)
    learning_rate: float = knob(2e-3, above=0, high=1)
    width: int = knob(128, low=16)
    history_noise: float = knob(0.1, low=0, high=1)  # share of the tokens before that are replaced in training
    layers: int = knob(4, low=1)
    heads: int = knob(4, low=1)
    reader_steps: int = knob(1500, low=1)  # of the token-to-text reward
    reader_batch_size: int = knob(32, low=1)
    precision: str = knob("auto", choices=("auto", "float32", "bf16"))

    def check(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width}: must be a multiple of 2 * heads={2 * self.heads}")


@dataclass(frozen=True)
class SynthesisConfig(Config):
    """Notebook 10: reinforcement of a language model that speaks in tokens."""

    section: ClassVar[str] = "synthesis"
    objective: str = knob("both", choices=("grpo", "diffro", "both"))  # notebook 10 trains all and keeps this one
    filtering: bool = True  # leave out failed decodes, odd lengths and groups without spread
    steps: int = knob(16, low=1)  # rounds of sampling and updating
    line_pool: int = knob(16, low=1)  # training lines that rounds draw from: what is learnt of one hardly carries over to others
    lines_per_step: int = knob(8, low=1)
    group_size: int = knob(8, low=2, why="a group of one has no advantage; use 2 or more")  # samples of a line
    max_tokens: int = knob(170, low=1)  # of a sample, 5.4 s; one that has not ended by then has failed
    temperature: float = knob(1.0, above=0, high=2)  # of the sampling, and of the policy that is trained and judged
    learning_rate: float = knob(2e-4, above=0, high=1)
    warmup_steps: int = knob(3, low=0)  # rounds over which the rate rises
    epochs: int = knob(2, low=1)  # updates of a round
    clip_range: float = knob(0.2, above=0, high=1)  # GRPO: of the ratio of one token's probabilities
    beta: float = knob(0.04, low=0)  # weight of the KL to the supervised start, nats a token
    diffro_weight: float = knob(0.5, low=0)  # "both": DiffRO's loss beside GRPO's
    gumbel_start: float = knob(2.0, above=0)  # DiffRO: temperature of the draws, first round
    gumbel_end: float = knob(0.5, above=0)  # and last
    text_weight: float = knob(1.0, low=0)  # of the multi-task reward
    attribute_weight: float = knob(0.2, low=0)  # of pitch and of rate
    quality_weight: float = knob(0.2, low=0)
    min_spread: float = knob(0.02, low=0)  # filtering: of the text part of a group's rewards
    length_deviations: float = knob(4.0, above=0)  # filtering: from the median length of a group
    decode_iterations: int = knob(4, low=1, high=1000)  # Griffin-Lim rounds for the recogniser's ear
    max_grad_norm: float = knob(1.0, above=0)
    micro_batch: int = knob(0, low=0)  # sequences learnt from at once; 0: all of a round
    precision: str = knob("float32", choices=("float32", "bf16"))
    eval_lines: int = knob(80, low=2)  # held-out lines the judge hears
    bootstrap: int = knob(2000, low=100)  # resamples of the 95 % interval
