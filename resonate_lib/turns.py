"""Taking turns on one device: encoder, rollout engine, reward and policy are loaded and released in order.

What has the turn lies on the device, everything else on the CPU or nowhere, so the device holds the largest part and not the
sum of all. Every move is counted in bytes of tensors; on a CPU nothing moves and the bytes are what a device would hold.
Source: the resource sharing of arXiv 2509.18569.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Part = nn.Module | torch.optim.Optimizer | Sequence | Callable[[], Any] | object


class Timeline(list):
    """The rows of a `Turns.timeline`, to be kept in a training's state: a resumed training goes on from those of the first."""

    def state_dict(self) -> dict[str, list]:
        """The rows, under one key."""
        return {"rows": list(self)}

    def load_state_dict(self, state: Mapping[str, list]) -> None:
        """The rows of `state_dict` in place of these."""
        self[:] = state["rows"]


@contextlib.contextmanager
def aside(*modules: nn.Module) -> Iterator[None]:
    """Within the block the modules lie on the CPU, after it where they were: for what nobody asks while another is trained."""
    places = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to("cpu")
    if any(place.type == "cuda" for place in places):
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for module, place in zip(modules, places, strict=True):
            module.to(place)


class Turns:
    """Parts that take turns on `device`, and the curve of the bytes that lie there.

    parts: name -> a module, an optimizer (its moments move), an object that holds some as attributes (a reward), a list of those
    that move together, or a function without arguments that loads one, called when its turn comes and forgotten after it. All
    that is given leaves the device at once.
    timeline: a list (None: a new one) that gets a row for each load and release, in order: part, action ("load" or "release"),
    resident (bytes on the device after it; of the last load of a turn, the most that was counted until its end) and everything
    (bytes that would lie there if every part stayed). A function's part counts in everything from its first turn on.

        turns = Turns({"policy": [network, optimizer], "reward": lambda: LalmReward.load(folder)}, "cuda")
        with turns.take("reward") as reward:
            ...
    """

    def __init__(self, parts: Mapping[str, Part], device: str | torch.device, timeline: list[dict[str, Any]] | None = None):
        if not parts:
            raise ValueError("no parts: name at least one that takes turns")
        self.parts, self.device = dict(parts), torch.device(device)
        self.timeline = [] if timeline is None else timeline
        self._here: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._open: tuple[str, ...] = ()
        for name, part in self.parts.items():
            if not _loads(part):
                self._sizes[name] = resident_bytes(part)
                _move(part, "cpu")

    @contextlib.contextmanager
    def take(self, *names: str) -> Iterator[Any]:
        """Within the block the named parts lie on the device; it gets them, a single one by itself, several as a tuple.

        The others are released first. What had the turn stays there until another's turn or `release`. ValueError for a name
        that is not among the parts; RuntimeError inside another turn.
        """
        for name in names or ("",):
            if name not in self.parts:
                raise ValueError(f"no part {name!r}: allowed are {', '.join(self.parts)}")
        if self._open:
            raise RuntimeError(f"{', '.join(self._open)} has the turn: end it first, or take both at once")
        self._release([name for name in self._here if name not in names])
        for name in [name for name in names if name not in self._here]:
            part = self.parts[name]() if _loads(self.parts[name]) else self.parts[name]
            self._here[name] = _move(part, self.device)
            self._note(name, "load")
        self._open = names
        try:
            yield self._here[names[0]] if len(names) == 1 else tuple(self._here[name] for name in names)
        finally:
            self.count()
            self._open = ()

    def count(self) -> None:
        """Count anew what has the turn: gradients and moments come and go while it lasts. Done at its end in any case."""
        for name in self._open:
            self._sizes[name] = resident_bytes(self._here[name])
        row = self.timeline[-1]
        row["resident"], row["everything"] = max(row["resident"], self.resident), max(row["everything"], self.everything)

    def end(self, *names: str) -> None:
        """After the last turn: of all parts the named ones lie on the device. No row tells of it; the timeline is of the turns."""
        for name in self._here.keys() - set(names):
            _move(self._here[name], "cpu")
        for name in names:
            _move(self.parts[name], self.device)
        self._here.clear()

    def release(self) -> None:
        """Take every part off the device; what a function loaded is forgotten."""
        self._release(list(self._here))

    def _release(self, names: list[str]) -> None:
        for name in names:
            _move(self._here.pop(name), "cpu")
            self._note(name, "release")
        if names and self.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine in another process may want it

    def _note(self, name: str, action: str) -> None:
        if name in self._here:
            self._sizes[name] = resident_bytes(self._here[name])
        self.timeline.append({"part": name, "action": action, "resident": self.resident, "everything": self.everything})

    @property
    def resident(self) -> int:
        """Bytes on the device now."""
        return sum(self._sizes[name] for name in self._here)

    @property
    def peak(self) -> int:
        """The most bytes that lay on the device at once."""
        return max((row["resident"] for row in self.timeline), default=0)

    @property
    def everything(self) -> int:
        """Bytes that would lie there if every part stayed."""
        return sum(self._sizes.values())


def resident_bytes(part: Any) -> int:
    """Bytes of a part's tensors: parameters, their gradients, buffers, an optimizer's state; memory that two share counts once."""
    found = {}
    for tensor in _tensors(part):
        storage = tensor.untyped_storage()
        found[id(storage) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def memory_curve(timeline: Sequence[Mapping[str, Any]], *, title: str = ""):
    """Figure: bytes on the device after each load and release of a `Turns.timeline`, beside what everything together would take.
    ValueError for an empty one."""
    from resonate_lib import plots

    if not timeline:
        raise ValueError("an empty timeline: nothing has taken its turn yet")
    everything = max(row["everything"] for row in timeline)
    figure, axes = plots._axes(size=(7.0, 2.6))
    ax = axes[0, 0]
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if everything >= u), (1024, "KiB"))
    parts = dict.fromkeys(row["part"] for row in timeline)
    colors = {part: plots.COLORS[i % len(plots.COLORS)] for i, part in enumerate(parts)}
    ax.step(range(len(timeline) + 1), [0, *(row["resident"] / unit for row in timeline)], where="post", color="black", linewidth=1)
    for i, row in enumerate(timeline, start=1):
        if row["action"] == "load":
            ax.bar(i, row["resident"] / unit, width=1, align="edge", color=colors[row["part"]], alpha=0.6)
    for part, color in colors.items():
        ax.bar(0, 0, color=color, alpha=0.6, label=part)
    ax.axhline(everything / unit, color="black", linestyle="--", linewidth=0.8, label="everything resident")
    ax.set(xlabel="loads and releases", ylabel=f"on the device ({name})", title=title)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _loads(part: Part) -> bool:
    """Whether it is a function; a reward can be called too, and is none."""
    return inspect.isroutine(part) or isinstance(part, (functools.partial, type))


def _members(part: Any) -> list[nn.Module | torch.optim.Optimizer]:
    if isinstance(part, (nn.Module, torch.optim.Optimizer)):
        return [part]
    if isinstance(part, (list, tuple)):
        return [member for one in part for member in _members(one)]
    return [held for held in getattr(part, "__dict__", {}).values() if isinstance(held, (nn.Module, torch.optim.Optimizer))]


def _tensors(part: Any) -> Iterator[Tensor]:
    for member in _members(part):
        if isinstance(member, nn.Module):
            for parameter in member.parameters():
                yield from (parameter, *([] if parameter.grad is None else [parameter.grad]))
            yield from member.buffers()
        else:
            yield from (value for state in member.state.values() for value in state.values() if torch.is_tensor(value))


def _move(part: Any, device: str | torch.device) -> Any:
    """The part, its tensors on the device; what has none (an engine's client) is left as it is."""
    for member in _members(part):
        if isinstance(member, nn.Module):
            member.to(device)
        else:
            # steps are counted on the CPU, except by the kernels of fused or capturable Adam: those want them beside the moments
            counted = any(group.get("fused") or group.get("capturable") for group in member.param_groups)
            for state in member.state.values():
                for key, value in state.items():
                    if torch.is_tensor(value) and (value.dim() or counted):
                        state[key] = value.to(device)
    return part
