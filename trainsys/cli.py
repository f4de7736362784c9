"""The `trainsys` command. Everything heavy is imported by the command that needs it, so that `--help` is instant."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from trainsys.recipe import Resolved

EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 3

_WITH_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
_OVERRIDES = "Any setting is an override: --section.key=value; `trainsys config tiny` prints all of them."

app = typer.Typer(
    name="trainsys",
    help="Train models that do not fit, on clusters that fail.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
jobs = typer.Typer(help="Watch and stop jobs on a Ray cluster.", no_args_is_help=True)
corpus = typer.Typer(help="Prepare text for training.", no_args_is_help=True)
app.add_typer(jobs, name="job")
app.add_typer(corpus, name="data")

Recipes = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE… [--key=value…]", help="Shipped names or .toml files, left to right, then overrides."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")]
Address = Annotated[str, typer.Option(help="Ray dashboard of the cluster, e.g. http://127.0.0.1:8265.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that `trainsys submit` printed.")]


def main() -> None:
    """Run the command line; exit code 0 done, 1 failed, 2 wrong usage, 3 stopped as asked and resumable."""
    app()


@app.command(context_settings=_WITH_OVERRIDES, epilog=_OVERRIDES)
def train(recipes: Recipes, resume: Resume = False) -> None:
    """Train in this process, as the only rank or torchrun's."""
    with _reported():
        from trainsys.session import train_here

        outcome = train_here(_resolve(recipes), resume=resume)
        raise typer.Exit(EXIT_STOPPED if outcome == "stopped" else 0)


@app.command(context_settings=_WITH_OVERRIDES, epilog=_OVERRIDES)
def launch(recipes: Recipes, resume: Resume = False) -> None:
    """Start all ranks of a run and watch them.

    They are processes of this machine or Ray actors (launch.kind); of a swarm all nodes are started.
    """

    def show(output: bytes) -> None:
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()

    with _reported():
        from trainsys.session import launch_ranks, outcome_of

        resolved = _resolve(recipes)
        if resolved.config.rl.swarm.nodes:
            _launch_swarm(resolved, resume=resume)
        result = launch_ranks(resolved, resume=resume, on_output=show)
        raise typer.Exit(EXIT_STOPPED if outcome_of(result) == "stopped" else 0)


@app.command(context_settings=_WITH_OVERRIDES, epilog=_OVERRIDES)
def submit(
    recipes: Recipes,
    address: Address,
    resume: Resume = False,
    wait: Annotated[bool, typer.Option(help="Follow the job's log (on stderr) and exit with its code.")] = True,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to upload and run in; without it only the recipe travels.")
    ] = None,
) -> None:
    """Run `trainsys launch` as a job on a Ray cluster.

    The job's id, alone, is printed on stdout. The recipe is resolved and checked here; trainsys must be installed
    on the cluster's machines.
    """
    with _reported():
        from launch import ray_job
        from trainsys.submission import submit_run

        job_id = submit_run(_resolve(recipes), address=address, resume=resume, working_dir=working_dir)
        print(job_id, flush=True)
        if wait:
            for text in ray_job.logs(job_id, address=address, follow=True):
                sys.stderr.write(text)
                sys.stderr.flush()
            raise typer.Exit(ray_job.wait(job_id, address=address))


@jobs.command("status")
def job_status(job_id: JobId, address: Address) -> None:
    """Print PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    with _reported():
        from launch import ray_job

        print(ray_job.status(job_id, address=address))


@jobs.command("logs")
def job_logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[bool, typer.Option(help="Stay until the job ends.")] = False,
) -> None:
    """Print what the job has printed."""
    with _reported():
        from launch import ray_job

        for text in ray_job.logs(job_id, address=address, follow=follow):
            sys.stdout.write(text)
            sys.stdout.flush()


@jobs.command("stop")
def job_stop(job_id: JobId, address: Address) -> None:
    """Ask the job to save and leave; returns when it has ended."""
    with _reported():
        from launch import ray_job

        print(ray_job.stop(job_id, address=address))


@app.command(context_settings=_WITH_OVERRIDES, epilog=_OVERRIDES)
def config(recipes: Recipes) -> None:
    """Print every setting with the source of its value."""
    with _reported():
        from trainsys import recipe
        from trainsys.check import check

        resolved = _resolve(recipes)
        values = dict(recipe.leaves(recipe.to_tree(resolved.config)))
        width = max(map(len, values))
        for key, value in values.items():
            print(f"{key:<{width}} = {_toml(value):<24}  # {resolved.sources[key]}")
        check(resolved.config, sources=resolved.sources)


@app.command("plan", context_settings=_WITH_OVERRIDES, epilog=_OVERRIDES)
def plan_run(
    recipes: Recipes,
    offload: Annotated[bool, typer.Option("--offload", help="Bytes per tier, time per step and efficiency.")] = False,
    probe: Annotated[
        Path | None, typer.Option(help="Figures of `python -m offload probe`; default: those it kept last.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the matrix rate that forward and backward reach.")
    ] = 0.5,
) -> None:
    """Predict a run's bytes and time per step on this machine."""
    with _reported():
        from offload.calibrate import KEPT
        from trainsys import planning

        if not offload:
            _fail("plan: say what to plan: --offload", EXIT_USAGE)
        resolved = _resolve(recipes)
        machine = planning.read_probe(probe or KEPT)
        print(planning.describe(resolved.config, machine, utilisation=utilisation, sources=resolved.sources))


@app.command()
def recipes() -> None:
    """List the recipes that ship with trainsys."""
    with _reported():
        from trainsys.recipe import shipped

        names = shipped()
        for name, description in names.items():
            print(f"{name:<{max(map(len, names))}}  {description}")


@app.command()
def env() -> None:
    """Print versions, devices, and where packages lie."""
    with _reported():
        from trainsys.environment import describe

        print(describe())


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]) -> None:
    """Summarise a run: loss, speed, validation, checkpoints."""
    with _reported():
        from trainsys.report import summarise

        print(summarise(run))


@corpus.command("prepare", context_settings=_WITH_OVERRIDES)
def data_prepare(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[--data.key=value…]", help="Settings of the data section.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; train from it with --data.path.")] = Path("prepared"),
    file_format: Annotated[str, typer.Option("--format", help="arrow (memory-mapped) or parquet (smaller).")] = "arrow",
) -> None:
    """Tokenise text into shards; goes on where a killed run left off."""
    with _reported():
        from trainsys.prepare import prepare_data

        prepare_data(_joined(overrides or []), out, file_format)


def _launch_swarm(resolved: Resolved, *, resume: bool) -> NoReturn:
    """Start and watch a swarm, write its report, and leave."""
    from trainsys.rl.report import has_rounds, summarise, write_report
    from trainsys.rl.swarm import outcome_of, run_swarm
    from trainsys.rl.watching import Screen

    config = resolved.config
    with contextlib.closing(Screen(config.steps, config.rl.tasks, sys.stdout)) as screen:
        run, views = run_swarm(resolved, resume=resume, watch=screen)
    if has_rounds(run.path):
        page = write_report(run.path)
        print(summarise(run.path), f"report: {page}", sep="\n")
    raise typer.Exit(EXIT_STOPPED if outcome_of(views) == "stopped" else 0)


def _resolve(arguments: list[str]) -> Resolved:
    """Split a command's arguments into recipes and overrides, and load them."""
    from trainsys import recipe

    arguments = _joined(arguments)
    return recipe.load(
        [argument for argument in arguments if not argument.startswith("-")],
        [argument for argument in arguments if argument.startswith("-")],
    )


def _joined(arguments: list[str]) -> list[str]:
    """Return `arguments` with `--key value` as `--key=value`."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and not argument.startswith("-"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn what a user can cause into one message and an exit code; anything else keeps its traceback."""
    try:
        yield
    except Exception as error:
        from trainsys.errors import ConfigError

        if isinstance(error, ConfigError):
            _fail(str(error), EXIT_USAGE)
        if isinstance(error, _expected_errors()):
            _fail(_told(error), EXIT_FAILED)
        raise


def _told(error: Exception) -> str:
    """Return what to print of `error`: where a rank met what a user can cause, its message without the tracebacks."""
    from launch import RankFailed

    if not isinstance(error, RankFailed) or not error.traceback:
        return str(error)
    raised = error.traceback.rpartition("Traceback (most recent call last):")[2].splitlines()
    known = tuple(f"{kind.__module__}.{kind.__qualname__}: " for kind in _trees(_expected_errors()))
    if not any(line.startswith(known) for line in raised):
        return str(error)
    return f"{str(error).partition(error.traceback.rstrip())[0]}(traceback: {error.log})"


def _trees(roots: tuple[type[Exception], ...]) -> Iterator[type[Exception]]:
    """Yield `roots` and all that is derived from them."""
    for root in roots:
        yield root
        yield from _trees(tuple(root.__subclasses__()))


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return the error trees of the packages in use; imported here because an error is never in a hurry."""
    from checkpoint import CheckpointError
    from launch import LaunchError
    from offload import OffloadError
    from trainsys.data import DataError
    from trainsys.errors import TrainsysError

    return TrainsysError, DataError, CheckpointError, LaunchError, OffloadError


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(code)
