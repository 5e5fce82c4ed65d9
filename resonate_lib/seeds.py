"""Several seeds as one result: the tables over all of them, and versions that ran apart pooled into one.

A version of several seeds ends with `summarise`. Seeds that ran apart (one to a GPU, one to a night) are brought together by
`pool`, with the same tables as if they had run in one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from resonate_lib import record, runs, versions

SAME = ("profile", "from_scratch", "overrides", "config")  # what pooled versions must agree in
APART = ("version", "seeds", "from", "started", "ended", "seconds", "git", "packages", "machine", "resumed", "pooled")


def summarise(version: Path, bootstrap: int) -> None:
    """Means over the seeds at the version's top; tables and words of notebooks 06 and 08 to 10 from the rows of all seeds instead.

    bootstrap: replicates. Raises OSError, and ValueError where the rows of the seeds do not fit together.
    """
    versions.summarise(version)
    if any(version.glob("seed*/metrics/tta_rows.csv")):
        _benchmark(version, bootstrap)
    if any(version.glob("seed*/metrics/ppo_rows.csv")):
        _methods(version, bootstrap)
    _speech(version, bootstrap)


def pool(names: list[str], results: Path | None = None) -> Path:
    """Copy the seeds of finished versions into a new one, and summarise them there; returns its folder.

    They must agree in profile, parameters, configuration and in the models they were measured and rewarded by, and have different
    seeds; the record keeps under `pooled` when, where and from which commit each came. Sources that differ are named on standard
    error and recorded. Raises ValueError, with nothing left behind.
    """
    root = versions.results_dir(results)
    folders = [versions.find(name, root) for name in names]
    found = [versions.read(folder) for folder in folders]
    _check(found)
    places = {seed: _place(folder, run, seed) for folder, run in zip(folders, found, strict=True) for seed in run["seeds"]}
    seeds = sorted(places)
    plans = [yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8")) for folder in folders]
    payload = {**plans[0], "seeds": seeds, "from": None}
    sources = {path for run in found for path in run["inputs"]}
    differ = sorted(path for path in sources if len({run["inputs"].get(path) for run in found}) > 1)
    if differ:
        print(f"note: sources differ between these versions: {', '.join(differ)}", file=sys.stderr)
    megabytes = sum(path.stat().st_size for place in places.values() for path in place.rglob("*") if path.is_file()) // 2**20
    versions.require_space(root, megabytes + 10)
    version = versions.allocate(found[0]["profile"], payload, root)
    try:
        for seed, place in places.items():
            shutil.copytree(place, version / f"seed{seed}", ignore=_not_a_seeds)
        record.atomic_write(version / "params.yaml", yaml.safe_dump(payload, sort_keys=False, allow_unicode=True))
        replicates = {**payload["config"]["eval"], **payload["overrides"].get("06", {})}["bootstrap"]
        summarise(version, replicates)
        record.write_json(version / "run.json", _record(version, found, payload, differ))
    except BaseException:
        shutil.rmtree(version, ignore_errors=True)
        raise
    return version


def _check(found: list[dict[str, Any]]) -> None:
    if len(found) < 2:
        raise ValueError("pool needs two versions or more: results pool A B")
    for run in found:
        if run["status"] != "DONE":
            raise ValueError(f"{run['version']} is {run['status']}: finish it first (run --resume {run['version']})")
    first = found[0]
    for other in found[1:]:
        unlike = [key for key in SAME if _anywhere(other[key]) != _anywhere(first[key])]
        unlike += ["notebooks"] if _notebooks(other) != _notebooks(first) else []
        mine, theirs = _instruments(first), _instruments(other)
        unlike += sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])
        if unlike:
            raise ValueError(
                f"{first['version']} and {other['version']} differ in {', '.join(unlike)}: only runs of the same settings can be "
                f"pooled; `results compare` shows how they differ"
            )
    seeds = [seed for run in found for seed in run["seeds"]]
    again = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if again:
        raise ValueError(f"seed {', '.join(map(str, again))} is in more than one of these versions: give different seeds")


def _anywhere(value: Any) -> Any:
    """Settings without the folders that files lie in, which are a machine's own; what the files hold is compared by sha256."""
    if isinstance(value, dict):
        return {key: _anywhere(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_anywhere(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _notebooks(run: dict[str, Any]) -> set[str]:
    return {key.rpartition("/")[2] for key in run["notebooks"]}


def _instruments(run: dict[str, Any]) -> dict[str, str]:
    """{name: sha256} of the models that a run took as they were; bases are a seed's own, and what a run trained is its result."""
    found = {}
    for item in run["notebooks"].values():
        inputs = item.get("notes", {}).get("inputs", {})
        taken = {name: note for name, note in inputs.items() if isinstance(note, dict) and note.get("source") != "this run"}
        found |= {name: note["sha256"] for name, note in taken.items() if "sha256" in note and name not in ("base", "diffusion")}
    return found


def _place(folder: Path, run: dict[str, Any], seed: int) -> Path:
    return folder / f"seed{seed}" if len(run["seeds"]) > 1 else folder


def _not_a_seeds(folder: str, names: list[str]) -> set[str]:
    """What stays behind: the record of a version of one seed, and working files."""
    top = {"params.yaml", "profile"} if "run.json" in names else set()
    return {name for name in names if name in {*top, *versions.UNHASHED} - {"answers"}}


def _record(version: Path, found: list[dict[str, Any]], payload: dict[str, Any], differ: list[str]) -> dict[str, Any]:
    notebooks = {
        f"seed{run['seeds'][0]}/{key}" if len(run["seeds"]) == 1 else key: item
        for run in sorted(found, key=lambda run: min(run["seeds"]))
        for key, item in run["notebooks"].items()
    }
    last = max(found, key=lambda run: run["ended"])
    return {
        "version": version.name,
        "status": "DONE",
        "exit_reason": "",
        **{key: payload[key] for key in ("profile", "seeds", "from", "from_scratch", "overrides")},
        "started": min(run["started"] for run in found),
        "ended": last["ended"],
        "seconds": round(sum(run["seconds"] for run in found), 1),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in found),
        "runner": None,
        **{key: last[key] for key in ("git", "packages", "machine")},
        "config": payload["config"],
        "notebooks": notebooks,
        "inputs": last["inputs"],
        "artefacts": record.tree(version, versions.UNHASHED),
        "resumed": [],
        "pooled": [{key: run[key] for key in APART if key in run} for run in found],
        "sources_differ": differ,
    }


def _benchmark(version: Path, n: int) -> None:
    from resonate_lib import plots  # torch is only loaded where it is needed
    from resonate_lib.evaluation import metrics, report, suite

    tables, said, main = suite.over_seeds(version, n=n)
    for name, table in tables.items():
        runs.write_table(version / "metrics", name, table)
    table = tables["tta_headline"]
    runs.write_table(version / "metrics", "tta_words", {"words": said})
    names = [main, *(name for name in metrics.HEADLINE if name in table and name != main)]
    record.atomic_write(version / "metrics" / "tta_headline.md", report.to_markdown(report.readable(table, names[:3])))
    record.atomic_write(version / "metrics" / "tta_headline.tex", report.to_latex(report.readable(table, names[:1])))
    title = f"{table['prompts'].max()} held-out prompts, {table['seeds'].max()} seeds"
    plots.save(plots.gains(table, metric=main, title=title), version / "figures" / "tta_gains.png")


def _methods(version: Path, n: int) -> None:
    from resonate_lib import plots
    from resonate_lib.evaluation import efficiency, report

    made = int(versions.read_table(version / "metrics" / "ppo_table.csv")["clips_made"].max())  # the seeds' own tables say so
    rows = versions.read_rows(version, "ppo_rows")
    table, names = efficiency.outcome(rows, clips=made, n=n)
    runs.write_table(version / "metrics", "ppo_table", table)
    judged = efficiency.judge_of(names)
    compared = [name for name in ("reward", judged) if name]
    runs.write_table(version / "metrics", "ppo_between", efficiency.between(rows, compared, n=n))
    shown = efficiency.shown(table, [name for name in ("reward", judged, "exact") if name in names])
    record.atomic_write(version / "metrics" / "ppo_table.md", report.to_markdown(shown))
    title = f"{table['prompts'].max()} held-out prompts, {table['seeds'].max()} seeds, {made} clips a method"
    for metric in compared:
        figure = plots.gains(table, metric=metric, base="its own base", title=title)
        plots.save(figure, version / "figures" / f"ppo_gains_{metric}.png")
    _reach(version)


def _reach(version: Path) -> None:
    """Clips to a gain over all seeds, in metrics; seconds, which belong to a machine, in notes."""
    from resonate_lib.evaluation import efficiency, report

    if not (tables := sorted(version.glob("seed*/metrics/ppo_reach.csv"))):
        return
    reach = pd.concat([versions.read_table(path) for path in tables])
    runs.write_table(version / "metrics", "ppo_reach", efficiency.reach_over_seeds(reach))
    notes = [json.loads(path.read_text(encoding="utf-8")).get("reach_s", {}) for path in sorted(version.glob("seed*/notes/*.json"))]
    took = [(*name.rsplit(" ", 1), seconds) for note in notes for name, seconds in note.items()]
    if took:
        took = pd.DataFrame(took, columns=["method", "gain", "seconds"])
        table = efficiency.reach_over_seeds(took, "seconds", ("method", "gain"))
        record.atomic_write(version / "notes" / "ppo_reach_seconds.md", report.to_markdown(table))


def _speech(version: Path, n: int) -> None:
    """The tables of notebooks 09 and 10 from the rows of all seeds, which are the second level of their intervals.

    All seeds start from one supervised model: these say what reinforcement does to that one.
    """
    for kind in ("asr", "asr_choice"):
        if any(version.glob(f"seed*/metrics/{kind}_rows.csv")):
            from resonate_lib.speech import errors

            table = errors.summary(versions.read_rows(version, f"{kind}_rows"), base="supervised", n=n)
            runs.write_table(version / "metrics", f"{kind}_summary", table)
    if any(version.glob("seed*/metrics/tts_rows.csv")):
        from resonate_lib.speech import synthesis_eval

        rows = versions.read_rows(version, "tts_rows")
        ears = [name.removeprefix("errors_") for name in rows.columns if name.startswith("errors_")]
        tables = [synthesis_eval.summary(part, ears=ears, base="supervised", n=n).assign(texts=texts)
                  for texts, part in rows.groupby("texts", sort=False)]  # fmt: skip
        runs.write_table(version / "metrics", "tts_summary", pd.concat(tables, ignore_index=True))
