"""What a reward is: one protocol, the check every call passes, a weighted mix, and `load_reward`, which turns a line of
configuration into a reward. The models that give scores live in `clap` and `lalm`, what is asked beyond the caption in `fine`,
text rules in `rules`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from resonate_lib import reward_spec

SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "tiny"
LONGEST_TRIM = 0.1  # seconds that may be cut off silently: codecs round a clip up to whole frames


@dataclass
class RewardResult:
    """scores: (B,) float32 on the CPU, higher is better. parts: name -> (B,), what the scores are made of."""

    scores: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Scores a batch of waveforms against their prompts: audio (B, T) in [-1, 1], sample_rate in Hz, B prompts,
    metadata a list of B dicts (the prompt records) or None."""

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult: ...


def check_result(result: RewardResult, batch: int, name: str = "reward") -> RewardResult:
    """The result with its scores and parts as (batch,) float32 tensors on the CPU.

    Parts may hold nan where something was not asked; scores may not. Raises ValueError, naming the reward, for a wrong
    type or shape and for scores that are not finite.
    """
    if not isinstance(result, RewardResult):  # one kind of error for everything the contract refuses
        raise ValueError(
            f"reward {name!r} returned {type(result).__name__}: a RewardResult(scores, parts) is needed"
        )
    scores = _vector(result.scores, batch, f"reward {name!r}: scores")
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    if bad:
        shown = ", ".join(f"[{i}]={scores[i].item()}" for i in bad[:4])
        raise ValueError(
            f"reward {name!r}: {len(bad)} of {batch} scores are not finite ({shown}); return finite numbers"
        )
    parts = {key: _vector(part, batch, f"reward {name!r}: part {key!r}") for key, part in result.parts.items()}
    return RewardResult(scores, parts)


def _vector(values: Any, batch: int, what: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} are {type(values).__name__}, not {batch} numbers ({error})") from None
    if tuple(tensor.shape) != (batch,):
        raise ValueError(f"{what} have shape {tuple(tensor.shape)}; {(batch,)} is needed, one number for each clip")
    return tensor


class Checked:
    """A reward whose every call is checked, what goes in and what comes out; errors carry its name."""

    def __init__(self, reward: Reward, name: str):
        self.reward, self.name = reward, name

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        if audio.ndim != 2:
            raise ValueError(f"reward {self.name!r}: audio has shape {tuple(audio.shape)}; (clips, samples) is needed")
        batch = audio.shape[0]
        for what, values in (("prompts", prompts), ("metadata", metadata)):
            if values is not None and len(values) != batch:
                raise ValueError(f"reward {self.name!r}: {batch} clips but {len(values)} {what}; give one for each")
        return check_result(self.reward(audio, sample_rate, prompts, metadata), batch, self.name)

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """What a generator climbs, (B,) with its gradient to the audio (B, T), on the audio's device: a CLAP's cosine, the
        logarithm of an LALM's score, the weighted sum of these.

        ValueError where the reward has none: a server, a user's function, or one that cannot ask without the prompt records.
        """
        if not hasattr(self.reward, "differentiable"):
            raise ValueError(f"reward {self.name!r} has no gradient: DiffRO needs clap, lalm or a sum of the two")
        scores = self.reward.differentiable(audio, sample_rate, prompts).to(audio.device)
        if tuple(scores.shape) != (len(audio),) or not bool(torch.isfinite(scores).all()):
            raise ValueError(f"reward {self.name!r}: {len(audio)} finite scores are needed, got shape {tuple(scores.shape)}")
        return scores


class WeightedMix:
    """The per-sample weighted sum of rewards (not divided by the weights' sum), as in the published multi-reward.

    terms: (weight, name, reward). Parts: each reward's own score under its name, and its parts under `name/part`.
    """

    def __init__(self, terms: Sequence[tuple[float, str, Reward]]):
        names = [name for _, name, _ in terms]
        if not terms or len(set(names)) < len(names):
            raise ValueError(f"a mix of {names}: name at least one reward, and each of them once")
        self.terms = [(float(weight), name, Checked(reward, name)) for weight, name, reward in terms]

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        scores, parts = torch.zeros(audio.shape[0]), {}
        for weight, name, reward in self.terms:
            result = reward(audio, sample_rate, prompts, metadata)
            scores = scores + weight * result.scores
            parts[name] = result.scores
            parts.update({f"{name}/{key}": part for key, part in result.parts.items()})
        return RewardResult(scores, parts)

    def differentiable(self, audio: Tensor, sample_rate: int, prompts: list[str]) -> Tensor:
        """The weighted sum (B,) with its gradient to the audio. ValueError where a term has none."""
        return sum(weight * reward.differentiable(audio, sample_rate, prompts) for weight, _, reward in self.terms)


class FunctionReward:
    """A user's function (audio, sample_rate, prompts, metadata) -> B numbers (or a RewardResult) as a reward.

    Without metadata the function gets B empty dicts, so that it need not ask.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(
        self, audio: Tensor, sample_rate: int, prompts: list[str], metadata: list[dict] | None = None
    ) -> RewardResult:
        metadata = [{} for _ in prompts] if metadata is None else metadata
        result = self.function(audio, sample_rate, prompts, metadata)
        return result if isinstance(result, RewardResult) else RewardResult(result)


def load_reward(spec: str, **context: Any) -> Checked:
    """The reward a line of configuration names: 'clap', 'lalm', 'lalm_fine' (the LALM asked about each event and the relation,
    see `fine`), a sum such as '0.5*clap+0.5*lalm', or a user's own as 'path/to/file.py:function' or 'package.module:function'
    (also as a term of a sum).

    context: `clap` and `lalm` are a directory or a ready reward each; `weights` is the directory that holds both
    (default: the checkpoints shipped with the package); `text` is the text encoder for CLAP (default: MiniLM).
    Raises ValueError or FileNotFoundError with the nearest match for a name that does not exist.
    """
    terms = reward_spec.terms(spec)
    if len(terms) == 1 and terms[0][0] == 1.0:
        return Checked(_load_one(terms[0][1], context), terms[0][1])
    return Checked(WeightedMix([(weight, name, _load_one(name, context)) for weight, name in terms]), spec)


def _load_one(name: str, context: dict) -> Reward:
    if ":" in name:
        return _load_function(name)
    if name == "lalm_fine":
        from resonate_lib.rewards.fine import FineLalm, taught

        judge = _load_one("lalm", context)
        if not taught(judge):
            print("lalm_fine: this judge was taught the whole caption alone, and guesses at single questions; train it again "
                  "(notebook 02, --from-scratch)", flush=True)
        return FineLalm(judge)
    source = context.get(name) or Path(context.get("weights") or SHIPPED) / name
    if callable(source):
        return source
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"reward {name!r}: no checkpoint in {source}; train one in notebook 02 or name its folder"
        )
    # Imported here: a user's own reward should not pay for transformers.
    if name == "clap":
        from resonate_lib.rewards.clap import ClapReward

        return ClapReward.load(source, text=context.get("text"))
    from resonate_lib.rewards.lalm import LalmReward

    context["lalm"] = LalmReward.load(source)  # a sum of lalm and lalm_fine shares one model
    return context["lalm"]


def _load_function(spec: str) -> FunctionReward:
    where, _, name = spec.rpartition(":")
    module = _load_file(Path(where).expanduser(), spec) if where.endswith(".py") else _load_module(where, spec)
    function = getattr(module, name, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = reward_spec.nearest(name, offered)
        raise ValueError(f"reward={spec!r}: {where} has no function {name!r}{near}; it has {offered}")
    return FunctionReward(function)


def _load_file(path: Path, spec: str) -> Any:
    reward_spec.file_of(path, spec)
    found = importlib.util.spec_from_file_location(f"user_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises becomes one line that names the file
        raise ValueError(f"reward={spec!r}: {path} does not load: {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, spec: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"reward={spec!r}: cannot import {name!r}: {type(error).__name__}: {error}") from error


def to_clip(audio: Tensor, sample_rate: int, target_rate: int, seconds: float) -> Tensor:
    """audio (B, T) at sample_rate as (B, target_rate·seconds) at target_rate: resampled, padded with silence at the end.

    Raises ValueError when the audio is longer than the clip by more than 0.1 s: cutting events off would change the
    score without a word.
    """
    if sample_rate != target_rate:
        import torchaudio

        audio = torchaudio.functional.resample(audio, sample_rate, target_rate)
    samples = round(target_rate * seconds)
    if audio.shape[-1] > samples + LONGEST_TRIM * target_rate:
        length = audio.shape[-1] / target_rate
        raise ValueError(
            f"audio of {length:.2f} s: this reward hears {seconds:g} s; cut the clips or train a longer one"
        )
    return torch.nn.functional.pad(audio[..., :samples], (0, max(0, samples - audio.shape[-1])))


def clip_of(questions: Sequence[str], count: int, clips: Sequence[int] | None) -> list[int]:
    """The clip, of `count`, that each question is about: `clips`, or for None the i-th question's is the i-th.

    Raises ValueError where their numbers do not fit, and for a clip that there is not.
    """
    of = list(range(count)) if clips is None else [int(clip) for clip in clips]
    if len(of) != len(questions) or not all(0 <= clip < count for clip in of):
        told = f"clips from {min(of, default=0)} to {max(of, default=0)}" if clips is not None else "no clips named"
        raise ValueError(f"{len(questions)} questions about {count} clips, {told} ({len(of)}): name one clip for each question")
    return of


def initial_seed(seed: int, stream: int = 0) -> torch.Generator:
    """A generator for what is drawn before training starts, apart from the training loop's own streams."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + stream)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up to `peak`, then a half cosine down to a tenth of it: a function of the step alone, so that a
    resumed run repeats it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()))
