"""The line of configuration that names a reward: read, and checked before anything is loaded.

'clap', 'lalm', 'lalm_fine', a sum such as '0.5*clap+0.5*lalm', or a user's own as 'path/to/file.py:function' or
'package.module:function', also as a term of a sum. No torch here: the runner reads it before a kernel starts.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path

BUILT_IN = ("clap", "lalm", "lalm_fine")


def terms(spec: str) -> list[tuple[float, str]]:
    """(weight, name) of each term of a sum. Raises ValueError that names the nearest reward."""
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"reward={spec!r}: name a reward, such as 'clap', '0.5*clap+0.5*lalm' or 'my_reward.py:score'")
    if Path(spec.rpartition(":")[0]).is_file():
        return [(1.0, spec)]
    pieces, found = spec.split("+"), []
    while pieces:
        # a path may hold a "+": then a term is the fewest pieces that end in ":function"
        ends = [n for n in range(1, len(pieces) + 1) if ":" in pieces[n - 1]]
        taken = ends[0] if ends and "/" in pieces[0] and ":" not in pieces[0] else 1
        found.append(_term("+".join(pieces[:taken]).strip(), spec))
        del pieces[:taken]
    return found


def judges(spec: str) -> set[str]:
    """The models of BUILT_IN that a spec asks; `lalm_fine` asks `lalm`."""
    return {name.removesuffix("_fine") for _, name in terms(spec) if name in BUILT_IN}


def check(spec: str) -> None:
    """Raise ValueError for a name that is none or stands twice, a weight that is 0 or no number, a module or file that is not there
    or a file without such a function; nothing is executed."""
    found = terms(spec)
    names = [name for _, name in found]
    if len(set(names)) < len(names):
        raise ValueError(f"reward={spec!r}: a reward stands in it twice; add up its weights")
    for weight, name in found:
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"reward={spec!r}: the weight of {name} is {weight:g}; write a number other than 0, or leave it out")
        where, _, function = name.rpartition(":")
        module = where.split(".")[0]
        if where and not where.endswith(".py") and (not module.isidentifier() or importlib.util.find_spec(module) is None):
            raise ValueError(f"reward={spec!r}: no module {where!r} here; give a file as 'path/to/file.py:{function}'")
        if where.endswith(".py"):
            offered = _names(Path(where).expanduser(), spec)
            if function not in offered and "*" not in offered:
                open_ones = [one for one in offered if not one.startswith("_")]
                near = nearest(function, open_ones)
                raise ValueError(f"reward={spec!r}: {where} has no function {function!r}{near}; it has {open_ones}")


def nearest(name: str, names: Iterable[str]) -> str:
    """ (nearest: 'x'), or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return f" (nearest: {close[0]!r})" if close else ""


def file_of(path: Path, spec: str) -> Path:
    """The file itself; FileNotFoundError names the nearest one."""
    if not path.is_file():
        files = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"reward={spec!r}: no file {path}{nearest(path.name, files)}; check the path")
    return path


def _names(path: Path, spec: str) -> list[str]:
    """What a file defines or imports at its top; "*" where it imports all of something."""
    try:
        body = ast.parse(file_of(path, spec).read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"reward={spec!r}: {path} does not load: {type(error).__name__}: {error}") from None
    found = []
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [alias.asname or alias.name for alias in node.names]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            found += [name for target in targets if (name := getattr(target, "name", getattr(target, "id", None)))]
            found += ["*"] if isinstance(node, (ast.If, ast.Try, ast.With)) else []  # what is defined there is known when it runs
    return found


def _term(term: str, spec: str) -> tuple[float, str]:
    weight, star, name = term.partition("*")
    if not star:
        return 1.0, _known(term, spec)
    try:
        return float(weight), _known(name.strip(), spec)
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
        raise ValueError(f"reward={spec!r}: {weight!r} is not a number; write a sum as '0.5*clap+0.5*lalm'") from None


def _known(name: str, spec: str) -> str:
    if name in BUILT_IN or ":" in name:
        return name
    allowed = "'clap', 'lalm', 'lalm_fine', 'file.py:function' or 'module:function'"
    raise ValueError(f"reward={spec!r}: no reward {name!r}{nearest(name, BUILT_IN)}; allowed are {allowed}")
