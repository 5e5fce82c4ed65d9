"""LoRA: low-rank additions to chosen weights of a FluxAudio, trained while the network itself stays frozen.

The adapters are peft's, but what they add goes into the weight (W + alpha/rank B A) and not beside its output. Here that is
needed: the attention reads `qkv.weight` itself, so peft's own layer would be passed over without a word, and peft cannot
adapt a channel-last convolution at all. It also makes an adapted network and its merged weights the same numbers.
Source: LoRA (arXiv 2106.09685). The published Resonate names targets that its network does not have; Flow-GRPO adapts the
projections to queries, keys and values and the output projections of attention, in both streams: `qkv` and `linear1` here.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from resonate_lib.models.flux_audio import Condition, FluxAudio, ProjectedText
from resonate_lib.models.layers import ChannelLastConv

TARGETS = ("attn.qkv", "linear1", "text_input_proj.0", "text_cond_proj.0")  # ends of module names; others have `lora_targets`
TRAINED = "trained"  # the adapter that learns; it is the active one whenever nothing else is being computed


class AdaptedWeight(lora.Linear):
    """peft's adapter of a linear map, around a linear map or a channel-last convolution, its sum taken in the weight.

    A convolution's weight (out, in, kernel) is adapted as a matrix (out, in*kernel): the same A and B as in peft's Conv1d.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.weight[0].numel(), len(module.weight)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """alpha/rank B A in the weight's shape, float32 also under autocast, so that merging gives the same numbers."""
        with torch.autocast(self.get_base_layer().weight.device.type, enabled=False):
            return super().get_delta_weight(adapter).view_as(self.get_base_layer().weight)

    @property
    def weight(self) -> Tensor:
        weight = self.get_base_layer().weight
        if self.disable_adapters:
            return weight
        for name in self.active_adapters:
            weight = weight + self.get_delta_weight(name)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.get_base_layer(), {"weight": self.weight}, (x,))


class Form(NamedTuple):
    """What `attach` needs to know of adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """Low-rank additions by themselves: tensors by module name + ".lora_A.weight" (rank, in) or ".lora_B.weight" (out, rank)."""

    tensors: dict[str, Tensor]
    form: Form


class Adapted:
    """A network under one of its adapters, or under none (name None), used wherever a network computes velocities.

    Adapters share the network's weights: a reference is the same network with none, an old or averaged policy one more
    adapter. `state_dict` and `parameters` are the adapter's alone.
    """

    def __init__(self, model: PeftModel, name: str | None, form: Form, trainable: list[nn.Parameter]):
        self.model, self.name, self.form, self.trainable = model, name, form, trainable  # trainable: before it was adapted
        self.network: FluxAudio = model.get_base_model()

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        if self.name is None:
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(self.name, inference_mode=self.name != TRAINED)
        try:
            yield
        finally:
            self.model.set_adapter(TRAINED)

    @property
    def latent_mean(self) -> Tensor:
        return self.network.latent_mean

    def empty_condition(self, batch: int) -> Condition:
        return self.network.empty_condition(batch)

    def project_text(self, condition: Condition) -> ProjectedText:
        with self._active():
            return self.network.project_text(condition)

    def velocity(self, latent: Tensor, text: ProjectedText, t: Tensor) -> Tensor:
        with self._active():
            return self.network.velocity(latent, text, t)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's tensors, named without the adapter's name."""
        middle = f".{self.name}."
        return ((n.replace(middle, "."), p) for n, p in self.network.named_parameters() if ".lora_" in n and middle in n)

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy another adapter's tensors in. ValueError when they are of other layers or another rank."""
        own = dict(self.named_parameters())
        differ = [name for name in own.keys() | state.keys() if name not in own or name not in state
                  or own[name].shape != state[name].shape]  # fmt: skip
        if differ:
            raise ValueError(f"{len(differ)} of {len(own)} tensors do not fit this adapter, such as {min(differ)}: "
                             "it was made with another lora_rank, other targets or another network")  # fmt: skip
        for name, parameter in own.items():
            parameter.copy_(state[name])

    def reference(self) -> "Adapted":
        """The network without its adapters, as it was when they were attached."""
        return Adapted(self.model, None, self.form, self.trainable)

    def companion(self, name: str) -> "Adapted":
        """One more adapter, equal to this one now and never trained by itself."""
        with torch.random.fork_rng(devices=[]):
            self.model.add_adapter(name, _config(self.form))
        self.model.set_adapter(TRAINED)
        other = Adapted(self.model, name, self.form, self.trainable)
        other.load_state_dict(self.state_dict())
        return other


def _config(form: Form) -> LoraConfig:
    ends = "|".join(re.escape(target) for target in form.targets)
    config = LoraConfig(r=form.rank, lora_alpha=form.alpha, target_modules=rf"(?:.*\.)?(?:{ends})")
    config._register_custom_module({nn.Linear: AdaptedWeight, ChannelLastConv: AdaptedWeight})
    return config


def attach(
    network: FluxAudio, rank: int = 32, alpha: float = 64.0, targets: tuple[str, ...] = (), *, seed: int = 0
) -> Adapted:
    """Freeze the network and put adapters on its layers whose names end in `targets`; returns the one that learns. By default
    on the network's own `lora_targets`, else on TARGETS.

    B starts at zero, so nothing changes yet; A is drawn from the seed alone. Linear maps and convolutions can be adapted,
    norms and stored statistics cannot. ValueError when a target names no layer.
    """
    names, usual = [name for name, _ in network.named_modules()], getattr(network, "lora_targets", TARGETS)
    targets = targets or usual
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"LoRA target {target!r} names no layer of this network; allowed are ends of layer names, such as "
                             + ", ".join(usual))  # fmt: skip
    form = Form(rank, alpha, tuple(targets))
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(network, _config(form), adapter_name=TRAINED)
    return Adapted(model, TRAINED, form, trainable)


def state(adapted: Adapted) -> Adapter:
    """A copy of the adapter on the CPU."""
    return Adapter({name: tensor.cpu().clone() for name, tensor in adapted.state_dict().items()}, adapted.form)


def merge(adapted: Adapted) -> FluxAudio:
    """Add the adapter to the network's weights and take all adapters off; returns the network, an ordinary one again.

    Names, shapes and trainable weights are those before `attach`; what was added is kept as `network.adapter`.
    """
    kept = state(adapted)
    network = adapted.model.merge_and_unload(adapter_names=[adapted.name])
    for parameter in adapted.trainable:
        parameter.requires_grad_(True)
    network.adapter = kept
    return network


def save(adapter: Adapter, path: str | Path) -> None:
    """One safetensors file of the adapter, its rank, alpha and targets as metadata."""
    save_file(adapter.tensors, path, metadata={"lora": json.dumps(adapter.form._asdict())})


def load(network: FluxAudio, path: str | Path) -> Adapted:
    """Attach an adapter that `save` wrote to the network it was trained on. ValueError when it does not fit."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "lora" not in metadata:
            raise ValueError(f"{path}: no adapter; give a file that `lora.save` wrote")
        form, tensors = json.loads(metadata["lora"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    adapted = attach(network, **form)
    adapted.load_state_dict(tensors)
    return adapted
