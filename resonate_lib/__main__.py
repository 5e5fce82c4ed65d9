"""The command line: `python -m resonate_lib run|generate|results|listen|doctor|bench|verify`.

Results go to standard output, logs and errors to standard error. Whatever can be mended by the user is one line, exit
code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(
        prog="python -m resonate_lib", description="Online RL for text-to-audio, on a laptop."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="execute the notebooks into a new version under results/")
    run.add_argument("--profile", help="smoke, tiny (default), small, paper: a file in notebooks/params")
    run.add_argument("--only", nargs="+", metavar="NN", help="notebooks by number: 04,06")
    run.add_argument("--all", action="store_true", help="08 and later too")
    run.add_argument("--seed", nargs="+", metavar="N", help="one or more: --seed 0 1 2")
    run.add_argument("-p", dest="parameters", action="append", nargs="+", default=[], metavar="NAME VALUE",
                     help="a value of a parameters cell; repeatable; also name=value; 04.name for notebook 04 alone")  # fmt: skip
    run.add_argument(
        "--from", dest="from_version", metavar="VERSION", help="take models of earlier notebooks from there"
    )
    run.add_argument("--from-scratch", action="store_true", help="retrain everything; use no shipped weights")
    run.add_argument("--resume", metavar="VERSION", help="go on with an interrupted or failed version")
    generate = commands.add_parser("generate", help="a prompt to a sound file")
    generate.add_argument("prompt")
    generate.add_argument("--out", default="generated.wav", help="suffix .wav, .flac or .mp3 (default: generated.wav)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 is none (default: 3)")
    generate.add_argument("--steps", type=int, default=25)
    what = "folder of a generator that the suite saved; or a folder, file or hub id of published weights (default: shipped)"
    generate.add_argument("--weights", help=what)
    what = "list versions; compare A B ...: how others differ from A, with intervals; pool A B ...: their seeds as one version"
    results = commands.add_parser("results", help=what)
    results.add_argument("versions", nargs="*", metavar="VERSION", help="number, name or folder; one: its notebooks")
    form = results.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="tables for a README or an issue")
    form.add_argument("--latex", action="store_true", help="tables for a paper (package booktabs)")
    listen = commands.add_parser("listen", help="open a version's listening pages; with answers: how often who was preferred")
    listen.add_argument("version", nargs="?", default="latest")
    doctor = commands.add_parser("doctor", help="what this machine can run, and how to mend what it cannot")
    doctor.add_argument("--weights", metavar="DIR", help="a directory to look for published weights in (default: the profile's)")
    doctor.add_argument("--profile", choices=("small", "paper"), default="paper", help="whose judges to look for (default: paper)")
    doctor.add_argument("--msclap", action="store_true", help="make the environment of MS-CLAP, TTA-Bench's CLAP score, with pip")
    commands.add_parser("bench", help="times of the stages against scoring and sampling clip by clip")
    verify = commands.add_parser("verify", help="recompute a version's checksums")
    verify.add_argument("version", nargs="?", default="latest")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (a notebook failed, a check found something), 2 (bad input), 130
    (Ctrl-C)."""
    options = parser().parse_args(arguments)
    try:
        return globals()[f"{options.command}_command"](options)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        return _error(f"package {error.name} is missing: pip install -r requirements.txt")
    except ValueError as error:
        return _error(str(error))
    except OSError as error:
        return _error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _error(text: str) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return 2


def run_command(options: argparse.Namespace) -> int:
    """A new version, or an old one resumed."""
    from resonate_lib import batch

    every = 5.0 if sys.stderr.isatty() else 10.0
    overrides = parameters(options.parameters)
    if options.resume:
        if any(
            (
                options.profile,
                options.only,
                options.all,
                options.seed,
                overrides,
                options.from_version,
                options.from_scratch,
            )
        ):
            raise ValueError("--resume takes everything from the version: give no other option")
        return batch.report(*batch.resume(options.resume, every=every))
    profile = _once("profile", options.profile, overrides.pop("profile", None)) or "tiny"
    seeds = _once("seed", options.seed, overrides.pop("seed", None)) or ["0"]
    only = tuple(item for text in options.only or [] for item in text.split(",") if item) or None
    if only and options.all:
        raise ValueError("--only and --all exclude each other: give one")
    from resonate_lib.knobs import coerce

    request = batch.Request(
        profile=profile, only=only, all_notebooks=options.all, overrides=overrides, from_version=options.from_version,
        from_scratch=options.from_scratch, seeds=tuple(coerce("seed", item, int) for item in seeds))  # fmt: skip
    return batch.report(*batch.start(request, every=every))


def parameters(given: list[list[str]]) -> dict[str, str]:
    """`-p name value` and `-p name=value ...` as a dict. Raises ValueError for anything else and for a name given
    twice."""
    pairs: list[tuple[str, str]] = []
    for words in given:
        if len(words) == 2 and "=" not in words[0]:
            pairs.append((words[0], words[1]))
        elif all("=" in word for word in words):
            pairs += [tuple(word.split("=", 1)) for word in words]
        else:
            raise ValueError(f"-p {' '.join(words)}: write -p name value, or -p name=value")
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"-p {name} is given {names.count(name)} times: give it once")
    return dict(pairs)


def _once(name: str, option, parameter):
    if option is not None and parameter is not None:
        raise ValueError(f"--{name} and -p {name} say the same: give one")
    return option if option is not None else [parameter] if name == "seed" and parameter is not None else parameter


def generate_command(options: argparse.Namespace) -> int:
    """One prompt, one file; prints its path."""
    if options.steps < 1 or not 0 <= options.guidance <= 20:
        raise ValueError(
            f"steps={options.steps}, guidance={options.guidance}: use 1 or more steps and guidance from 0 to 20"
        )
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"seed={options.seed}: use a whole number from 0 to 2**63 - 1")
    if not options.prompt.strip():
        raise ValueError('the prompt is empty: describe a sound, such as "a dog barks, followed by rain"')
    suffix = Path(options.out).suffix.lower()
    if suffix not in (".wav", ".flac", ".mp3"):
        raise ValueError(
            f"--out {options.out}: {suffix or 'no suffix'} is not an audio format; use .wav, .flac or .mp3"
        )
    from resonate_lib import audio
    from resonate_lib.data import events, prompts
    from resonate_lib.models.generator import Generator
    from resonate_lib.runs import shipped_weights

    known = prompts.vocabulary(options.prompt)
    if not options.weights and not known.events:
        names = ", ".join(sorted(events.EVENTS))
        raise ValueError(f"{options.prompt!r} names no sound that the shipped model knows: use some of {names}")
    if not options.weights and known.note:
        print(f"note: {known.note}", file=sys.stderr)
    weights = Path(options.weights or shipped_weights("tiny") / "base")
    ours = (weights / "generator.json").is_file() or not options.weights
    generator = Generator.load(weights) if ours else Generator.load_published(options.weights)
    latents = generator.generate(
        [options.prompt], steps=options.steps, guidance_scale=options.guidance, seeds=[options.seed]
    )
    print(audio.write(options.out, generator.decode(latents)[0].clamp(-1, 1), generator.sample_rate))
    return 0


def results_command(options: argparse.Namespace) -> int:
    """No name: all versions. One: its notebooks. Two or more, with or without `compare`: how the others differ from the first.
    `pool` and two or more: a new version of all their seeds."""
    from resonate_lib import versions
    from resonate_lib.evaluation import tables

    show = tables.to_markdown if options.markdown else tables.to_latex if options.latex else _plain
    if options.versions[:1] == ["pool"]:
        from resonate_lib import seeds

        print(seeds.pool(options.versions[1:]))
        return 0
    if options.versions[:1] == ["compare"] or len(options.versions) > 1:
        from resonate_lib.evaluation import across

        for title, table in across.sections(options.versions[options.versions[0] == "compare" :]):
            print(f"\n{'% ' if options.latex else ''}{title}{':' if len(table) else ': none'}\n")
            print(show(table) if len(table) else "", end="")
        return 0
    if options.versions:
        folder = versions.find(options.versions[0])
        run = versions.read(folder)
        print(f"{folder}\n{run['status']} {run['exit_reason']}".rstrip())
        for name, item in run["notebooks"].items():
            print(
                f"  {name:<32} {item['status']:<12} {item.get('seconds', 0):>8.1f} s",
                item.get("exit_reason", ""),
            )
        return 0
    table = versions.table()
    print(show(table) if len(table) else "no versions yet: python -m resonate_lib run\n", end="")
    return 0


def _plain(table) -> str:
    return table.to_string(index=False) + "\n"


def listen_command(options: argparse.Namespace) -> int:
    """Print the pages' paths, open them where there is a browser, and print the preference rate of the answers there are."""
    from resonate_lib import versions

    folder = versions.find(options.version)
    places = [folder, *sorted(folder.glob("seed*"))]
    found = [next((place / name for place in places if (place / name).is_file()), None) for name in versions.PAGES]
    pages = [page for page in found if page]
    if not pages:
        raise ValueError(f"{folder.name} has no listen.html: notebook 07 makes it (run --only 07 --from {folder.name})")
    for page in pages:
        print(page)
        if sys.stdout.isatty():
            import webbrowser

            webbrowser.open(page.as_uri())
    folders = [place for place in places if any(place.glob("answers/*.jsonl"))]
    if folders:
        from resonate_lib import listen

        answers = [answer for place in folders for answer in listen.load_answers(place / "answers")]
        rates = listen.preference_rate(answers)
        print(rates.round(3).to_string(index=False) if len(rates) else f"{len(answers)} answers, none about {listen.BASE}")
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    """The table of checks; 1 when `tiny` cannot run here. With --msclap: make that environment, print its folder."""
    if options.msclap:
        from resonate_lib.evaluation import msclap

        print(msclap.make_environment())
        return 0
    from resonate_lib import doctor

    return doctor.main(options.profile, options.weights)


def bench_command(options: argparse.Namespace) -> int:
    """One line per measurement."""
    from resonate_lib import bench

    for line in bench.lines():
        print(line, flush=True)
    return 0


def verify_command(options: argparse.Namespace) -> int:
    """List what is not as recorded; 1 when an artefact has changed or is missing."""
    from resonate_lib import versions

    folder = versions.find(options.version)
    table = versions.verify(folder)
    odd = table[table["state"] != "ok"]
    if len(odd):
        print(odd.to_string(index=False))
    artefacts = table[table["kind"] == "artefact"]
    good, changed = (artefacts["state"] == "ok").sum(), artefacts["state"].isin(["changed", "missing", "new"]).sum()
    later = ((table["kind"] == "input") & (table["state"] != "ok")).sum()
    print(f"{folder.name}: {good} of {len(artefacts)} files as recorded, {changed} not; "
          f"{later} of its sources have changed since")  # fmt: skip
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
