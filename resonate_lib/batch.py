"""The runner: which notebooks, with which parameters, for which seeds; one version folder; one record.

Everything that can be wrong with a request is found before a kernel starts. `kernel.py` executes a single notebook.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import yaml

from resonate_lib import config, kernel, record, runs, seeds, versions
from resonate_lib.config import CHECKOUT
from resonate_lib.parameters import SHARED, check, discover, inspect, reach


@dataclass(frozen=True)
class Request:
    """What to run. `overrides` maps parameter names to text or values: `steps` for every notebook that declares it,
    `04.steps` for that one alone. None in `only` means 00 to 07."""

    profile: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    only: tuple[str, ...] | None = None
    all_notebooks: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)
    from_version: str | None = None
    from_scratch: bool = False


@dataclass
class Plan:
    """A checked request: the notebooks in order with the values each gets, and the record about to be written.

    parameters: {notebook number: {name: value}}, and under `data` the values that every notebook resolves for itself.
    """

    request: Request
    notebooks: dict[str, Path]
    parameters: dict[str, dict[str, Any]]
    declared: dict[str, set[str]]
    payload: dict[str, Any]
    params_dir: Path
    from_path: Path | None = None

    def jobs(self) -> list[tuple[str, str, int, str]]:
        """(key in the record, notebook number, seed, sub-folder) in the order of execution: that of their numbers, but from
        scratch 00 comes last, since there is nothing to hear before 02."""
        many = len(self.request.seeds) > 1
        order = sorted(self.notebooks, key=lambda number: self.request.from_scratch and number == "00")
        inner = {seed: f"seed{seed}" if many else "" for seed in self.request.seeds}
        return [
            (f"{inner[seed]}/{self.notebooks[number].stem}".lstrip("/"), number, seed, inner[seed])
            for seed in self.request.seeds
            for number in order
        ]


def notebooks_dir(folder: str | os.PathLike | None = None) -> Path:
    """The notebooks: the argument, else RESONATE_NOTEBOOKS, else `notebooks/` of the checkout. ValueError when
    absent."""
    path = Path(folder or os.environ.get("RESONATE_NOTEBOOKS") or CHECKOUT / "notebooks").resolve()
    if not path.is_dir():
        raise ValueError(
            f"no notebooks in {path}: clone the repository and install it with `pip install -r requirements.txt`"
        )
    return path


def make_plan(request: Request, *, folder: str | os.PathLike | None = None, results: Path) -> Plan:
    """Check the whole request. Raises ValueError in one line; starts nothing and writes nothing.

    Says on standard error which parameters reach several notebooks.
    """
    given = request.seeds
    if not given or len(set(given)) < len(given) or not 0 <= min(given) <= max(given) < 2**31:
        raise ValueError(f"seeds {list(request.seeds)}: give different whole numbers from 0 to {2**31 - 1}")
    notebooks_path = notebooks_dir(folder)
    params_dir = Path(os.environ.get("RESONATE_PARAMS") or notebooks_path / "params").resolve()
    resolved = config.resolve_all(request.profile, params_dir)
    notebooks = discover(notebooks_path, request.only, request.all_notebooks)
    declared = {number: inspect(path) for number, path in notebooks.items()}
    parameters = check(request.overrides, declared, request.profile, params_dir)
    for section in SHARED:
        resolved[section].update(parameters.get(section, {}))
    from_path = versions.find(request.from_version, results) if request.from_version else None
    _check_data(resolved, request, from_path, notebooks)
    for line in reach(request.overrides, parameters):
        print(line, file=sys.stderr)
    payload = {
        "profile": request.profile,
        "seeds": list(request.seeds),
        "notebooks": [path.stem for path in notebooks.values()],
        "from": from_path.name if from_path else None,
        "from_scratch": request.from_scratch,
        "overrides": parameters,
        "config": resolved,
    }
    return Plan(
        request,
        notebooks,
        parameters,
        {number: set(names) for number, names in declared.items()},
        payload,
        params_dir,
        from_path,
    )


def _check_data(resolved: dict[str, Any], request: Request, from_path: Path | None, notebooks: dict[str, Path]) -> None:
    """Raise ValueError for data that a later notebook could not use, or that its models have met in training."""
    data, later = resolved["data"], [number for number in notebooks if number not in ("00", "01")]
    if resolved["suite"]["world"] != "embedded":
        if set(notebooks) != {"00"} and not (data["folder"] and data["captions"]):
            raise ValueError(f"profile {request.profile} needs recordings with captions: add -p folder DIR and -p captions FILE")
        empty = [name for name in ("clap_source", "lalm_source") if not resolved["reward"][name]]
        if "05" in notebooks and empty:
            rest = ",".join(number for number in notebooks if number != "05")
            raise ValueError(
                f"{empty[0]} is empty, and notebook 05 compares CLAP and LALM: name a directory, hub id or server with "
                f"-p {empty[0]} ..., or leave it out with --only {rest}"
            )
        return
    if data["captions"] and not data["folder"]:
        raise ValueError(f"captions={data['captions']!r} without a folder: add -p folder DIR, where its recordings lie")
    from resonate_lib.data import scenes

    for name, value in {"seconds": scenes.SECONDS, "sample_rate": scenes.SAMPLE_RATE}.items():
        if resolved["suite"][name] != value:
            raise ValueError(f"{name}={resolved['suite'][name]:g}: the embedded world's scenes have {value:g}; leave it out")
    if not later:
        return
    if data["folder"]:
        raise ValueError(
            f"folder={data['folder']!r}: notebook {later[0]} needs to know which events a clip holds, which a caption file "
            "does not say; show your recordings with --only 01"
        )
    theirs = versions.read(from_path)["config"]["data"]["world_seed"] if from_path else 0
    if data["world_seed"] != theirs and not request.from_scratch:
        raise ValueError(
            f"world_seed={data['world_seed']}: the models of {from_path.name if from_path else 'the suite'} were trained on "
            f"the combinations of world seed {theirs}, so nothing would be held out from them; add --from-scratch, or use "
            f"--only 01"
        )


def start(
    request: Request,
    *,
    folder: str | os.PathLike | None = None,
    results: str | os.PathLike | None = None,
    every: float = 10.0,
) -> tuple[Path, dict[str, Any]]:
    """Run a new version; returns its folder and its final record. Raises ValueError before anything is started."""
    root = versions.results_dir(results)
    plan = make_plan(request, folder=folder, results=root)
    _require_space(plan, root, len(request.seeds))
    _check_published(plan, list(plan.notebooks))
    run = {
        "version": "",
        "status": "RUNNING",
        "exit_reason": "",
        **{key: plan.payload[key] for key in ("profile", "seeds", "from", "from_scratch", "overrides")},
        "started": now(),
        "ended": None,
        "seconds": 0.0,
        "peak_rss_mb": 0.0,
        "runner": record.this_process(),
        "git": record.git_state(CHECKOUT),
        "packages": record.package_versions(),
        "machine": record.machine(),
        "config": plan.payload["config"],
        "notebooks": {key: {"status": "PENDING"} for key, *_ in plan.jobs()},
        "inputs": _sources(plan),
        "artefacts": {},
        "resumed": [],
    }
    version = versions.allocate(request.profile, plan.payload, root)
    run["version"] = version.name
    record.write_json(version / "run.json", run)
    record.atomic_write(version / "params.yaml", yaml.safe_dump(plan.payload, sort_keys=False, allow_unicode=True))
    return version, _run(plan, version, run, every)


def resume(
    name: str, *, folder: str | os.PathLike | None = None, results: str | os.PathLike | None = None, every: float = 10.0
) -> tuple[Path, dict[str, Any]]:
    """Go on with a version that is not DONE: finished notebooks stay, the others run, their training from its last
    save.

    Raises ValueError when it is DONE, is running, or the configuration, the library, a notebook or the shipped weights
    have changed since: what is done could not be told from what is not.
    """
    root = versions.results_dir(results)
    version = versions.find(name, root)
    run = versions.read(version)
    if run["status"] == "DONE":
        raise ValueError(f"{version.name} is DONE and is never edited: start a new run")
    if run["status"] == "RUNNING":
        raise ValueError(f"{version.name} is running now (process {run['runner']['pid']}): wait for it or stop it")
    recorded = yaml.safe_load((version / "params.yaml").read_text(encoding="utf-8"))
    overrides = {f"{place}.{name}": value for place, mine in recorded["overrides"].items() for name, value in mine.items()}
    request = Request(
        profile=recorded["profile"],
        seeds=tuple(recorded["seeds"]),
        overrides=overrides,
        only=tuple(recorded["notebooks"]),
        from_version=recorded["from"],
        from_scratch=recorded["from_scratch"],
    )
    plan = make_plan(request, folder=folder, results=root)
    if plan.payload != recorded:
        raise ValueError(
            f"{version.name}: the profile, the defaults or the notebooks have changed since it started, so it "
            "cannot end as it would have: start a new run"
        )
    before, today = run["inputs"], _sources(plan)
    changed = sorted(path for path in {**before, **today} if before.get(path) != today.get(path))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"{version.name}: {', '.join(changed[:3])}{more} changed since it started, so it cannot end as it would have: "
            "start a new run"
        )
    waiting = _waiting(plan, run)
    _require_space(plan, root, len({seed for _, _, seed, _ in waiting}))
    _check_published(plan, sorted({number for _, number, _, _ in waiting}), version)
    if versions.read(version)["status"] == "RUNNING":  # someone else was as quick: the checks above take a while
        raise ValueError(f"{version.name} is running now: wait for it or stop it")
    run.update(status="RUNNING", exit_reason="", runner=record.this_process())
    run["resumed"].append({"at": now(), "git": record.git_state(CHECKOUT)})
    record.write_json(version / "run.json", run)
    return version, _run(plan, version, run, every)


def _require_space(plan: Plan, root: Path, seeds: int) -> None:
    """Ask for `suite.disk_mb` a seed where results go, and where corpora go. Raises ValueError."""
    megabytes = plan.payload["config"]["suite"]["disk_mb"] * seeds
    versions.require_space(root, megabytes)
    versions.require_space(runs.cache_dir(), megabytes, "RESONATE_CACHE")


def _check_published(plan: Plan, notebooks: list[str], version: Path | None = None) -> None:
    """Where models are published ones, say what will be downloaded and how much memory each notebook takes.

    version: the one that is resumed. Raises ValueError where a part is neither here nor to be had, or a notebook cannot fit.
    """
    settings = plan.payload["config"]
    if settings["suite"]["world"] != "folder":
        return
    import torch

    from resonate_lib import budget, memory

    trained = "02" in notebooks and plan.request.from_scratch
    for line in budget.parts(settings, notebooks, plan.parameters, base=_base(plan, version), trained=trained):
        print(line, file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("working out how much memory it takes", file=sys.stderr, flush=True)
    print(budget.report(settings, notebooks, plan.parameters, device, memory.available(device)), file=sys.stderr)


def _base(plan: Plan, version: Path | None) -> Path | None:
    """The base that every seed finds (`Run.resolve_input`) before the published one; of several seeds, that of the first."""
    shipped = None if plan.request.from_scratch else Path(plan.payload["config"]["suite"]["weights"]).expanduser() / "base"
    found = []
    for seed in plan.request.seeds:
        tops = [top / inner for top in (version, plan.from_path) if top for inner in (f"seed{seed}", "")]
        places = [*(top / "checkpoints" / "base" for top in tops), shipped]
        found.append(next((place for place in places if place and place.exists()), None))
    return found[0] if all(found) else None


def _sources(plan: Plan) -> dict[str, str]:
    return record.sources(CHECKOUT, [*plan.notebooks.values(), plan.params_dir / f"{plan.request.profile}.yaml"])


def _waiting(plan: Plan, run: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    return [job for job in plan.jobs() if run["notebooks"].get(job[0], {}).get("status") != "DONE"]


def _kernel_params(plan: Plan, version: Path) -> Path:
    """The folder of the profile that kernels read: where SHARED values are given, a copy that holds them, inside the
    version, since every notebook resolves those sections for itself."""
    given = {section: plan.parameters[section] for section in SHARED if section in plan.parameters}
    if not given:
        return plan.params_dir
    content = config.load_profile(plan.request.profile, plan.params_dir)
    content |= {section: {**content.get(section, {}), **values} for section, values in given.items()}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return record.atomic_write(version / "profile" / f"{plan.request.profile}.yaml", text).parent


def _run(plan: Plan, version: Path, run: dict[str, Any], every: float) -> dict[str, Any]:
    """Execute what is not DONE, and close the record. A full disk or Ctrl-C ends the run with its reason."""
    begun, before = time.monotonic(), run["seconds"]
    record.atomic_write(version / ".reserve", b"\0" * 2**18)  # given back at the end: a full disk can still be recorded
    status, reason, summing = "DONE", "", False
    try:
        with _terminable(), kernel.Watch(every=every) as watch:
            status, reason = _jobs(plan, version, run, watch)
            if status == "DONE" and len(plan.request.seeds) > 1:
                summing = True
                evaluated = {**plan.payload["config"]["eval"], **plan.parameters.get("06", {})}
                seeds.summarise(version, evaluated["bootstrap"])
    except KeyboardInterrupt:
        status, reason = "INTERRUPTED", "interrupted between notebooks"
    except OSError as error:
        status, reason = "FAILED", record.explain(error, version)
    except ValueError as error:
        status, reason = "FAILED", f"summary over the seeds: {error}" if summing else str(error)
    except Exception as error:  # tables of notebooks that were changed may lack anything
        if not summing:
            raise
        status, reason = "FAILED", f"summary over the seeds: {type(error).__name__}: {error}"
    with _undisturbed():
        run.update(status=status, exit_reason=reason, ended=now(), seconds=round(before + time.monotonic() - begun, 1))
        with contextlib.suppress(OSError):
            _close(version, run)
    return run


def _close(version: Path, run: dict[str, Any]) -> None:
    (version / ".reserve").unlink(missing_ok=True)
    if run["status"] == "DONE":
        for state in [version / ".state", *version.glob("seed*/.state")]:
            shutil.rmtree(state, ignore_errors=True)
    run["artefacts"] = record.tree(version, versions.UNHASHED)
    record.write_json(version / "run.json", run)


def _jobs(plan: Plan, version: Path, run: dict[str, Any], watch: kernel.Watch) -> tuple[str, str]:
    waiting, params_dir = _waiting(plan, run), _kernel_params(plan, version)
    for place, (key, number, seed, inner) in enumerate(waiting):
        path, folder = plan.notebooks[number], version / inner if inner else version
        folder.mkdir(exist_ok=True)
        earlier = run["notebooks"].get(key, {})  # of a resumed run: what was spent before its training went on
        spent, peak = earlier.get("seconds", 0.0), earlier.get("peak_rss_mb", 0)
        run["notebooks"][key] = {"status": "RUNNING", "started": now(), "seconds": spent, "peak_rss_mb": peak}
        record.write_json(version / "run.json", run)
        cells = len(nbformat.read(path, as_version=4).cells)
        expected = {later: _expected(plan, version, later) for later in plan.request.seeds}  # what is done by now included
        watch.begin(
            f"{key} ({place + 1}/{len(waiting)})",
            cells,
            expected[seed][number],
            sum(expected[later][name] for _, name, later, _ in waiting[place + 1 :]),
        )
        outcome = _one(plan, number, seed, folder, params_dir, watch)
        notes = folder / "notes" / f"{path.stem}.json"
        run["notebooks"][key] = {
            "status": outcome.status,
            "started": run["notebooks"][key]["started"],
            "seconds": round(spent + outcome.seconds, 1),
            "peak_rss_mb": max(peak, round(outcome.peak_rss_mb)),
            "exit_reason": outcome.reason,
            "notes": json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {},
        }
        run["peak_rss_mb"] = max(run["peak_rss_mb"], round(outcome.peak_rss_mb))
        if outcome.status != "DONE":
            return outcome.status, f"{key}: {outcome.reason}"
        record.write_json(version / "run.json", run)
    return "DONE", ""


def _one(plan: Plan, number: str, seed: int, folder: Path, params_dir: Path, watch: kernel.Watch) -> kernel.Outcome:
    path = plan.notebooks[number]
    given = {"profile": plan.request.profile, "seed": seed, **plan.parameters[number]}
    values = {name: value for name, value in given.items() if name in plan.declared[number]}
    variables = kernel.environment(
        folder,
        path.stem,
        params_dir=params_dir,
        from_version=plan.from_path,
        from_scratch=plan.request.from_scratch,
        offline=plan.payload["config"]["suite"]["world"] == "embedded",
    )
    return kernel.execute(path, folder / "notebooks" / path.name, values, variables, watch)


def _expected(plan: Plan, version: Path, seed: int) -> dict[str, float]:
    """{number: seconds} for a seed: from the latest run of the same kind and the same settings (this one's earlier seeds too),
    else from the profile's tables, else a minute. Another seed than 0 trains its own base model, unless --from brings one."""

    profile = config.load_profile(plan.request.profile, plan.params_dir)

    def kind(number: str, scratch: bool, brought, seed: int) -> str:
        """The table of minutes that this notebook has its own entry in, "" for the common one."""
        name = "minutes_from_scratch" if scratch else "minutes_own_base" if seed and not brought else ""
        return name if number in profile.get(name, {}) else ""

    mine = {number: kind(number, plan.request.from_scratch, plan.from_path, seed) for number in plan.notebooks}
    seconds = {number: 60.0 * float(profile.get(table or "minutes", {}).get(number, 1)) for number, table in mine.items()}
    for name in versions.table(version.parent)["version"]:
        with contextlib.suppress(ValueError, KeyError):
            run = versions.read(version.parent / name)
            if run["profile"] != plan.request.profile or run["config"] != plan.payload["config"]:
                continue
            for key, item in run["notebooks"].items():
                folder, _, notebook = key.rpartition("/")
                its, number = int(folder.removeprefix("seed")) if folder else run["seeds"][0], notebook[:2]
                same = run["overrides"].get(number) == plan.parameters.get(number)
                same = same and kind(number, run["from_scratch"], run["from"], its) == mine.get(number)
                if same and item["status"] == "DONE":
                    seconds[number] = float(item["seconds"])
    return seconds


@contextlib.contextmanager
def _terminable():
    """Let a polite kill (SIGTERM) end the run as Ctrl-C does: with a record."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _undisturbed():
    """While the record is closed, further Ctrl-C wait."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def now() -> str:
    """Local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def report(version: Path, run: dict[str, Any]) -> int:
    """Say on standard error how the run ended, print the folder on standard output, and return the exit code."""
    spent, memory = kernel.clock(run["seconds"]), run["peak_rss_mb"] / 1024
    if run["status"] == "DONE":
        print(f"DONE in {spent}, peak memory {memory:.1f} GB", file=sys.stderr)
    elif run["status"] == "INTERRUPTED":
        print(
            f"interrupted: {run['exit_reason']}; go on with `python -m resonate_lib run --resume {version.name}`",
            file=sys.stderr,
        )
    else:
        print(f"error: {run['exit_reason']}; executed notebooks are in {version}", file=sys.stderr)
    print(version, flush=True)
    return {"DONE": 0, "INTERRUPTED": 130}.get(run["status"], 1)
