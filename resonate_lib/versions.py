"""Run versions on disk: allotting `results/<NNNN>-<profile>-<hash8>/`, finding, listing, comparing, summing up and
verifying.

The record of a version is its `run.json`, written by the runner alone. A version that is DONE is never edited.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student

from resonate_lib import record
from resonate_lib.config import CHECKOUT
from resonate_lib.knobs import unknown

NAME = re.compile(r"(\d{4,})-(.+)-([0-9a-f]{8})$")
OPEN = ("RUNNING", "FAILED", "INTERRUPTED")  # what --resume may continue
NO_MEAN = re.compile(r"(.+_)?(low|high|p|p_holm)|seeds")  # of ends and of p values a mean is neither; counts of seeds
IDENTIFIERS = ("seed", "noise_seed", "guidance")  # stay where all seeds agree
PAGES = ("listen.html", "listen_ppo.html")  # to listen to, of notebooks 07 and 08
UNHASHED = ("run.json", "answers", ".state", ".reserve")  # the record itself, listeners' answers, working files


def results_dir(results: str | os.PathLike | None = None) -> Path:
    """Where versions live: the argument, else RESONATE_RESULTS, else `results/` in the checkout."""
    return Path(results or os.environ.get("RESONATE_RESULTS") or CHECKOUT / "results").resolve()


def require_space(folder: Path, megabytes: int, variable: str = "RESONATE_RESULTS") -> None:
    """Make `folder` and write into it once. Raises OSError-free ValueError when it is not writable or nearly full.

    variable: the environment variable that names another folder, for the error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record.atomic_write(folder / ".probe", b"\0" * 65536).unlink()
        free = shutil.disk_usage(folder).free // 2**20
    except OSError as error:
        raise ValueError(record.explain(error, folder).replace("RESONATE_RESULTS", variable)) from None
    if free < megabytes:
        raise ValueError(
            f"{folder} has {free} MB free and this profile needs {megabytes} MB: free some space, "
            f"or set {variable} to another folder"
        )


def allocate(profile: str, payload: Any, results: Path) -> Path:
    """Make a new version folder and return it. Two runs that start together get two numbers.

    payload: the full resolved configuration, from which the name's hash is taken. Raises OSError.
    """
    results.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name.split("-")[0]) for path in _folders(results)), default=0)
    while True:
        claim = (
            results / f".claim-{number:04d}"
        )  # mkdir is exclusive, and says who has the number; the hashes may differ
        try:
            claim.mkdir()
        except FileExistsError:
            number += 1
            continue
        try:
            if any(path.name.startswith(f"{number:04d}-") for path in _folders(results)):
                number += 1
                continue
            version = results / f"{number:04d}-{profile}-{record.hash8(payload)}"
            version.mkdir()
            return version
        finally:
            claim.rmdir()


def find(version: str | os.PathLike, results: str | os.PathLike | None = None) -> Path:
    """The folder of a version given as path, full name, number (`3`, `0003`) or `latest`. Raises ValueError, also for
    a number that two folders have."""
    direct = Path(version)
    if (direct / "run.json").is_file():
        return direct.resolve()
    folders = _folders(results_dir(results))
    if not folders:
        raise ValueError(f"no versions in {results_dir(results)}: make one with `python -m resonate_lib run`")
    text = str(version).rstrip("/").split("/")[-1]
    if text == "latest":
        return folders[-1]
    named = [path for path in folders if path.name == text]
    found = named or [path for path in folders if text.isdigit() and int(path.name.split("-")[0]) == int(text)]
    if len(found) > 1:  # made apart and put together here
        raise ValueError(f"version {text} is any of {', '.join(path.name for path in found)}: give the whole name")
    if not found:
        raise ValueError(unknown("version", text, [path.name for path in folders]))
    return found[0]


def read(version: Path) -> dict[str, Any]:
    """The version's run.json; its status reads INTERRUPTED where the runner is gone. Raises ValueError when
    unreadable."""
    try:
        content = json.loads((version / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(
            f"{version.name}: no readable run.json; it is not a version, or was damaged: start a new run"
        ) from None
    if content.get("status") == "RUNNING" and not record.is_alive(content.get("runner")):
        content["status"], content["exit_reason"] = (
            "INTERRUPTED",
            "the runner ended without a word (killed, or power lost)",
        )
    return content


def table(results: str | os.PathLike | None = None) -> pd.DataFrame:
    """All versions, oldest first: version, status, profile, seeds, started, minutes, memory_gb, reason."""
    rows = []
    for path in _folders(results_dir(results)):
        try:
            run = read(path)
        except ValueError as error:
            rows.append({"version": path.name, "status": "UNREADABLE", "reason": str(error)})
            continue
        rows.append(
            {
                "version": path.name,
                "status": run["status"],
                "profile": run["profile"],
                "seeds": " ".join(map(str, run["seeds"])),
                "started": run["started"],
                "minutes": round((run.get("seconds") or 0) / 60, 1),
                "memory_gb": round((run.get("peak_rss_mb") or 0) / 1024, 1),
                "reason": run.get("exit_reason") or "",
            }
        )
    return pd.DataFrame(
        rows, columns=["version", "status", "profile", "seeds", "started", "minutes", "memory_gb", "reason"]
    )


def compare(
    first: str | os.PathLike, second: str | os.PathLike, results: str | os.PathLike | None = None
) -> dict[str, pd.DataFrame]:
    """Tables of what differs between two versions: `config`, `time` (seconds), and one per metrics file they share.

    A metrics table has the text columns, and for each numeric column `<name>_a`, `<name>_b`, `<name>_change` (b - a).
    """
    paths = [find(version, results) for version in (first, second)]
    runs = [read(path) for path in paths]
    out = {"config": differences(dict(zip("ab", runs, strict=True)))}
    seconds = [{key: item.get("seconds") for key, item in run.get("notebooks", {}).items()} for run in runs]
    out["time"] = pd.DataFrame(
        [{"notebook": key, "a": seconds[0].get(key), "b": seconds[1].get(key)} for key in {**seconds[0], **seconds[1]}],
        columns=["notebook", "a", "b"],
    )
    for path in sorted((paths[0] / "metrics").glob("*.csv")):
        other = paths[1] / "metrics" / path.name
        if other.is_file():
            out[path.stem] = _compare_tables(read_table(path), read_table(other))
    return out


def differences(runs: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """What differs between the configurations of some records (run.json), by name: a line per value, a column per record."""
    flat = {name: _flatten(run.get("config", {})) for name, run in runs.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    lines = [{"name": key, **{name: values.get(key) for name, values in flat.items()}} for key in keys]
    changed = [line for line in lines if any(line[name] != line[next(iter(flat))] for name in flat)]
    return pd.DataFrame(changed, columns=["name", *flat], dtype=object)


def read_table(path: Path) -> pd.DataFrame:
    """A metrics file as `runs.write_table` wrote it: an empty cell is missing, the text "None" is text."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_rows(version: str | os.PathLike, name: str = "tta_rows") -> pd.DataFrame:
    """The rows of `metrics/<name>.csv` over all seeds of a version, in order of seed; FileNotFoundError where there are none."""
    folder = Path(version)
    folders = sorted(folder.glob("seed*"), key=lambda path: int(path.name[4:]) if path.name[4:].isdigit() else -1)
    paths = [path / "metrics" / f"{name}.csv" for path in (*folders, folder)]
    tables = [read_table(path) for path in paths if path.is_file()]
    if not tables:
        raise FileNotFoundError(f"no {name}.csv in {folder}: run notebook 06 first")
    return pd.concat(tables, ignore_index=True)


def summarise(version: Path) -> list[str]:
    """Gather `seed*/metrics/*.csv` into `metrics/` at the version's top; returns the names written.

    Tables with the same rows in every seed become means: each numeric column `x` turns into `x` (mean), `x_std` (n - 1), and a
    column `seeds` counts them; what a seed lacks has no mean. With each mean stands Student's 95 % interval over the seeds, which
    tells nothing of other prompts, as `x_low` and `x_high`, or as `low` and `high` after the column before them; not in curves (a
    column `step`) that have none. p values (`p`, `*_p`, `*_p_holm`) are left out, and so is an identifier that differs. Tables of
    other rows are put one under another with a first column `seed`. Tables of single clips (a column `id`) stay with their seeds.
    """
    from resonate_lib.runs import write_table

    folders = sorted(version.glob("seed*"), key=lambda path: int(path.name[4:]))
    written = []
    for name in sorted({path.name for folder in folders for path in (folder / "metrics").glob("*.csv")}):
        tables = {
            int(folder.name[4:]): read_table(folder / "metrics" / name)
            for folder in folders
            if (folder / "metrics" / name).is_file()
        }
        if any("id" in data.columns for data in tables.values()):
            continue
        written.append(name.removesuffix(".csv"))
        write_table(version / "metrics", written[-1], _over_seeds(tables))
    return written


def verify(version: str | os.PathLike, results: str | os.PathLike | None = None) -> pd.DataFrame:
    """Compare every file with the record: columns kind (artefact, input), path, state.

    state: ok, changed, missing, new, or `not in git` for the files of a checkpoints folder that is not there at all.
    For inputs (library, notebooks, shipped weights of the checkout) `changed` means: changed since the run.
    """
    folder = find(version, results)
    run = read(folder)
    present, expected = record.tree(folder, UNHASHED), run.get("artefacts", {})
    rows = []
    for path in sorted({**expected, **present}):
        state = "ok" if present.get(path) == expected.get(path) else "changed"
        if path not in expected:
            state = "new"
        elif path not in present:
            parts = path.split("/")
            pruned = "checkpoints" in parts and not folder.joinpath(*parts[: parts.index("checkpoints") + 1]).exists()
            state = "not in git" if pruned else "missing"
        rows.append({"kind": "artefact", "path": path, "state": state})
    for path, checksum in sorted(run.get("inputs", {}).items()):
        here = CHECKOUT / path
        state = "missing" if not here.is_file() else "ok" if record.sha256_file(here) == checksum else "changed"
        rows.append({"kind": "input", "path": path, "state": state})
    return pd.DataFrame(rows, columns=["kind", "path", "state"])


def _folders(results: Path) -> list[Path]:
    found = (
        [path for path in results.glob("*") if NAME.fullmatch(path.name) and path.is_dir()] if results.is_dir() else []
    )
    return sorted(found, key=lambda path: (int(path.name.split("-")[0]), path.name))


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _numeric(data: pd.DataFrame) -> list[str]:
    return [name for name in data.columns if pd.api.types.is_numeric_dtype(data[name]) and data[name].dtype != bool]


def _same_rows(first: pd.DataFrame, second: pd.DataFrame) -> bool:
    if list(first.columns) != list(second.columns) or len(first) != len(second):
        return False
    text = [name for name in first.columns if name not in _numeric(first) or name not in _numeric(second)]
    return first[text].equals(second[text])


def _compare_tables(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    if not _same_rows(first, second):
        return pd.concat([first.assign(version="a"), second.assign(version="b")], ignore_index=True)
    out = first[[name for name in first.columns if name not in _numeric(first)]].copy()
    for name in _numeric(first):
        out[f"{name}_a"], out[f"{name}_b"] = first[name], second[name]
        if not name.endswith(("low", "high")):  # the ends of two intervals are not subtracted
            out[f"{name}_change"] = second[name] - first[name]
    return out


def _over_seeds(tables: dict[int, pd.DataFrame]) -> pd.DataFrame:
    every = list(tables.values())
    if not all(_same_rows(every[0], other) for other in every[1:]):
        return pd.concat(
            [data.assign(seed=seed)[["seed", *data.columns.drop("seed", errors="ignore")]] for seed, data in tables.items()],
            ignore_index=True,
        )
    agreed = {name for name in IDENTIFIERS if name in every[0] and all(data[name].equals(every[0][name]) for data in every)}
    out = every[0].drop(
        columns=[name for name in every[0] if NO_MEAN.fullmatch(name) or (name in IDENTIFIERS and name not in agreed)]
    )
    numeric = _numeric(out)
    owner = next((name for name, after in itertools.pairwise(every[0].columns) if after == "low"), None)  # whose ends low, high are
    columns = {}  # of the table with its new columns, in order
    for name in out.columns:
        columns[name] = out[name]
        if name in agreed or name not in numeric:
            continue
        column = pd.concat([data[name] for data in every], axis=1)
        mean, deviation = column.mean(axis=1, skipna=False), column.std(axis=1, ddof=1, skipna=False)  # of all seeds or of none
        half = student.ppf(0.975, len(every) - 1) * deviation / len(every) ** 0.5
        stem = "" if name == owner else f"{name}_"
        ends = {f"{stem}low": mean - half, f"{stem}high": mean + half}
        told = set(ends) <= set(every[0]) or "step" not in every[0]
        columns |= {name: mean, **(ends if told else {}), f"{name}_std": deviation}
    return pd.DataFrame(columns, index=out.index).assign(seeds=len(every))
