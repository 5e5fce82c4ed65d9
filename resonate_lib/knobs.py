"""What a parameter is: a field of a frozen dataclass with a type and a range, read strictly from Python, YAML or a command line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar


def knob(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    why: str = "",
) -> Any:
    """A dataclass field with its allowed range: low <= value <= high, value > above, or one of `choices`.

    `why` replaces the general advice in the error. For a tuple every element is checked.
    """
    limits = {"low": low, "above": above, "high": high, "choices": choices, "why": why}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Config:
    """Base of the parameter classes: `section` names the block in the profile file. Raises ValueError on a bad
    value."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():
            value = coerce(name, getattr(self, name), kind)
            object.__setattr__(self, name, value)
            _check_range(name, value, self.__dataclass_fields__[name].metadata)
        self.check()

    def check(self) -> None:
        """Rules between fields; a subclass raises ValueError."""


def field_types(cls: type[Config]) -> dict[str, Any]:
    """{field name: type} in order, without class variables."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def unknown(what: str, name: str, known: list[str] | tuple[str, ...]) -> str:
    """The error text for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind` (int, float, bool, str, tuple[float, ...]), from Python, YAML or a command line, strictly.

    A float takes '3e-4', which YAML leaves a string; an int takes neither 1.5 nor '1.5'. Raises ValueError.
    """
    if typing.get_origin(kind) is tuple:
        items = value.strip("[]() ").split(",") if isinstance(value, str) else value
        items = [items] if isinstance(items, (int, float)) and not isinstance(items, bool) else items  # one number is a list of one
        if not isinstance(items, (list, tuple)) or not items:
            raise ValueError(f"{name}={value!r}: not a list; write values such as 1,2,3")
        return tuple(coerce(name, item, typing.get_args(kind)[0]) for item in items)
    text = value.strip() if isinstance(value, str) else value
    if kind is bool:
        answers = {"true": True, "false": False}
        if isinstance(text, bool) or (isinstance(text, str) and text.lower() in answers):
            return text if isinstance(text, bool) else answers[text.lower()]
        raise ValueError(f"{name}={value!r}: not a yes or no; write true or false")
    if kind is int:
        if isinstance(text, int) and not isinstance(text, bool):
            return text
        if isinstance(text, str) and re.fullmatch(r"[+-]?\d+", text):
            return int(text)
        raise ValueError(f"{name}={value!r}: not a whole number; write digits only")
    if kind is float:
        return _coerce_float(name, value, text)
    if isinstance(value, str):
        return value
    raise ValueError(f"{name}={value!r}: not a text; put it in quotes")


def _coerce_float(name: str, value: Any, text: Any) -> float:
    try:
        number = float("not a number" if isinstance(text, bool) else text)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r}: not a number; write one such as 0.5 or 3e-4") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r}: not finite; write a finite number")
    return number


def _check_range(name: str, value: Any, limits: Any) -> None:
    if limits.get("choices") and value not in limits["choices"]:
        raise ValueError(f"{name}={value!r}: {unknown('choice', str(value), limits['choices'])}")
    low, above, high = limits.get("low"), limits.get("above"), limits.get("high")
    for item in value if isinstance(value, tuple) else (value,):
        advice = ""
        if low is not None and item < low:
            advice = limits["why"] or f"use {low:g} or more"
        elif above is not None and item <= above:
            advice = limits["why"] or f"use more than {above:g}"
        elif high is not None and item > high:
            advice = f"use {high:g} or less"
        if advice:
            raise ValueError(f"{name}={item}: {advice}")
