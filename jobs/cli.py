"""The `tessera` command: one thin function a verb.

stdout carries results, stderr progress and logs. Users' mistakes are caught here, once, and become
one line and exit status 2.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jobs.config import (
    ExtractConfig,
    ExtractOptions,
    TilingOptions,
    load_config,
    parse_options,
    tiling_of,
    validate,
)
from jobs.plan_options import PlanOptions, load_plan_config
from jobs.secrets import hide_command_line
from jobs.terminal import BrokenRunError, claim_stderr, log_to_stderr
from model.errors import UserError
from pipeline.printable import printable
from pipeline.storage import redact

app = typer.Typer(
    name="tessera",
    help="Dataset-scale image feature extraction: WebDataset shards in, embedding shards out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options on a terminal of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Spelled here, as the modules that own them load Arrow and FAISS; a test holds them together.
IndexKind = Literal["flat", "hnsw", "ivf-pq"]
IndexVector = Literal["thumbnail", "mean", "first"]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Output = Annotated[str, typer.Argument(help="Folder or URL of the output.")]
Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT... OUTPUT",
        help="Shards, a folder, a glob, a brace range or @list.txt; then the output's folder "
        "or URL. Anything fsspec opens.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The head's dashboard, as http://127.0.0.1:8265.  [default: RAY_ADDRESS]",
    ),
]
Index = Annotated[str, typer.Argument(help="Folder or URL of an index of `tessera index`.")]
QueryModel = Annotated[
    str | None, typer.Option(help="Checkpoint that made OUTPUT, where it has moved.")
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with any of the options.")]


def options_of(model: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command every field of a pydantic model as an option of the same name.

    Values arrive in the command's `options` argument as they were typed; only those given.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(command, eval_str=True).parameters.values()
            if parameter.name != "options"
        ]
        added = [_parameter(name, field) for name, field in model.model_fields.items()]

        def run(**values: Any) -> None:
            mine = {parameter.name: values[parameter.name] for parameter in own}
            given = {
                parameter.name: values[parameter.name]
                for parameter in added
                if values[parameter.name] is not None
            }
            command(**mine, options=given)

        run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    help_text = f"{field.description}  [{_default_text(name, field)}]"
    if field.annotation is bool:
        option = typer.Option(f"{flag}/--no{flag[1:]}", help=help_text, show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        option = typer.Option(flag, help=help_text, show_default=False, metavar=_metavar(field))
        annotation = Annotated[str | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _default_text(name: str, field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        return "default: {}" if field.default_factory is not None else "required"
    if default is None:
        return "default: " + {"batch_tiles": "auto", "replicas": "all"}.get(name, "none")
    if isinstance(default, tuple):
        return "default: " + (",".join(default) or "none")
    if isinstance(default, ByteSize):
        return "default: " + default.human_readable()
    text = str(default)
    return "default: " + (text.lower() if isinstance(default, bool) else text)


def _metavar(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    text = str(kind)
    for word, shown in (
        ("ByteSize", "BYTES"),
        ("dict", "JSON"),
        ("tuple[int", "N|MIN:MAX"),
        ("tuple", "NAME,…"),
        ("int", "N"),
        ("float", "NUMBER"),
    ):
        if word in text:
            return shown
    return "TEXT"


def _job(
    command: str, paths: list[str] | None, config: Path | None, options: Mapping[str, Any]
) -> ExtractConfig:
    given = dict(options)
    if paths:
        if len(paths) == 1:
            raise UserError(f"{command}: expected INPUT and OUTPUT, got one of them")
        given |= {"input": tuple(paths[:-1]), "output": paths[-1]}
    return load_config(config, given)


@app.command("extract")
@options_of(ExtractOptions)
def extract_command(
    paths: Paths = None,
    *,
    config: ConfigFile = None,
    as_json: Json = False,
    options: Mapping[str, Any],
) -> None:
    """Embed every picture of INPUT's shards into OUTPUT. Safe to run again at any time."""
    job = _job("extract", paths, config, options)
    # Imported here: a mistake in the options is told before torch and Ray are loaded.
    from jobs.extract import extract
    from jobs.show import show_summary

    summary = extract(job)
    if as_json:
        print(json.dumps(summary.to_json(), indent=1))
    else:
        show_summary(summary, job.output)
    raise typer.Exit(summary.exit_status)


@app.command("reindex")
@options_of(ExtractOptions)
def reindex_command(
    paths: Paths = None,
    *,
    config: ConfigFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what there is to do, and do nothing.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Remove committed shards whose source is no longer there."),
    ] = False,
    rejects: Annotated[
        bool, typer.Option("--rejects", help="Try the rejects of unchanged shards again.")
    ] = False,
    as_json: Json = False,
    options: Mapping[str, Any],
) -> None:
    """Bring OUTPUT up to date: embed what is new or changed in INPUT, and only that."""
    job = _job("reindex", paths, config, options)
    from jobs.reindex import Wishes, reindex
    from jobs.reindex_plan import show_plan
    from jobs.show import show_reindexed

    done = reindex(
        job,
        Wishes(dry_run, prune, rejects),
        lambda plan: show_plan(plan, prune, on_stderr=as_json or not dry_run),
    )
    if as_json:
        print(json.dumps(done.to_json(), indent=1))
    else:
        show_reindexed(done)
    raise typer.Exit(done.exit_status)


@app.command("plan")
@options_of(PlanOptions)
def plan_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help="Shards, as `extract` takes them."),
    ] = None,
    *,
    config: ConfigFile = None,
    from_output: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="OUTPUT",
            help="Take all rates from the commits of this run, instead of measuring.",
        ),
    ] = None,
    as_json: Json = False,
    options: Mapping[str, Any],
) -> None:
    """Tell what a job will take before it is started: tiles, hours, memory, requests, price."""
    given = dict(options)
    if paths:
        given["input"] = tuple(paths)
    if from_output is not None:
        given["from_output"] = from_output
    job = load_plan_config(config, given)
    from jobs.plan import plan
    from jobs.show_plan import show_plan

    found = plan(job, frozenset(options))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_plan(found)


@app.command("demo")
def demo_command(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Folder for everything the demo makes.")
    ] = Path("tessera-demo"),
    as_json: Json = False,
) -> None:
    """Run the main job on pictures that ship with the project: no network, no GPU."""
    from jobs.demo import run_demo

    raise typer.Exit(run_demo(folder, as_json))


@app.command("status")
def status_command(
    output: Output,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Tell how far a run is, and what it has done so far."""
    from jobs.show import show_status
    from jobs.status import read_status

    status = read_status(output, parse_options(storage_options))
    if as_json:
        print(json.dumps(status.to_json(), indent=1))
    else:
        show_status(status, output)


@app.command("report")
def report_command(
    output: Output,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    plan: Annotated[
        Path | None, typer.Option(help="What `tessera plan --json` printed, to compare with.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--input", help="Where the shards are now, for pictures of rejects."),
    ] = None,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
) -> None:
    """Write one HTML file about OUTPUT: pace, replicas, stages, tiles, rejects, plan and actual."""
    from jobs.report import write_report

    write_report(output, out, plan, tuple(source or ()), parse_options(storage_options))
    print(out)


@app.command("verify")
def verify_command(
    output: Output,
    source: Annotated[
        list[str] | None,
        typer.Option("--input", help="Check keys, order and pictures against these shards too."),
    ] = None,
    recompute: Annotated[
        int, typer.Option(min=0, help="Pictures to compute again with transformers' own model.")
    ] = 0,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint for --recompute, where it has moved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of pictures.")] = 0,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Prove that OUTPUT is whole: counts, checksums, order, finite values. Non-zero when not.

    An INDEX may be given too: its files, and its shards against the commits of its OUTPUT.
    """
    options = parse_options(storage_options)
    from jobs.verify_index import is_index, show_index_verification, verify_index

    if is_index(output, options):
        if source or recompute or model:
            raise UserError(
                f"{redact(output)}: is an index; --input, --recompute and --model are for an OUTPUT"
            )
        found = verify_index(output, options)
        if as_json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            show_index_verification(found)
        raise typer.Exit(1 if found.problems else 0)
    from jobs.show import show_verification
    from jobs.verify import verify

    report = verify(
        output,
        inputs=tuple(source or ()),
        recompute=recompute,
        model=model,
        seed=seed,
        storage_options=options,
    )
    if as_json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        show_verification(report, output)
    raise typer.Exit(1 if report.problems else 0)


@app.command("index")
def index_command(
    output: Output,
    index: Annotated[str, typer.Argument(help="Folder or URL of the index.")],
    feature: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What is indexed.  [default: the first of OUTPUT]"),
    ] = None,
    vector: Annotated[
        IndexVector | None,
        typer.Option(
            help="One vector a picture: its thumbnail's, the mean of its tiles', or its first "
            "tile's.  [default: thumbnail]",
        ),
    ] = None,
    kind: Annotated[
        IndexKind | None,
        typer.Option(help="Kind of index.  [default: as it is, or by the number of vectors]"),
    ] = None,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Bring a nearest-neighbour index of OUTPUT up to date with its commits, or build it."""
    from jobs.index import build_index
    from jobs.show_index import show_estimate, show_indexed

    options = parse_options(storage_options)
    done = build_index(output, index, feature, vector, kind, options, show_estimate)
    if as_json:
        print(json.dumps(done.to_json(), indent=1))
    else:
        show_indexed(done, index)


@app.command("inspect")
@options_of(TilingOptions)
def inspect_command(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture file.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write.  [default: IMAGE's name + .tiles.png]")
    ] = None,
    tile_size: Annotated[int, typer.Option(min=14, help="Side of a tile in pixels.")] = 448,
    as_json: Json = False,
    options: Mapping[str, Any],
) -> None:
    """Write a picture of how one image is tiled."""
    from jobs.contact_sheet import caption
    from jobs.inspect import inspect_picture

    chosen = validate(TilingOptions, options)
    written = out or image.with_name(f"{image.name}.tiles.png")
    plan = inspect_picture(image, written, tiling_of(chosen, tile_size, tile_size))
    if as_json:
        print(json.dumps({"picture": str(written), **asdict(plan)}, indent=1))
    else:
        print(f"{image}: {caption(plan)}\n{written}")


@app.command("search")
def search_command(
    index: Index,
    image: Annotated[Path | None, typer.Option(help="A picture file.")] = None,
    key: Annotated[str | None, typer.Option(help="Key of a picture of the index.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="Shard of --key, where several shards have it.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Neighbours to print.")] = 10,
    model: QueryModel = None,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Print the pictures of an index that are nearest to one: distance, key, shard, caption."""
    from jobs.search import Query, search, show_neighbors, to_json

    query = Query(image, key, shard)
    found = search(index, query, count, model, parse_options(storage_options))
    if as_json:
        print(json.dumps({"neighbors": [to_json(neighbor) for neighbor in found]}, indent=1))
    else:
        show_neighbors(found)


@app.command("browse")
def browse_command(
    index: Index,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On loopback; 0: any that is free.")
    ] = 8427,
    source: Annotated[
        list[str] | None,
        typer.Option("--input", help="Where the shards are now, if they have moved."),
    ] = None,
    model: QueryModel = None,
    storage_options: Annotated[
        str, typer.Option(help="Passed to fsspec, as a JSON object.", metavar="JSON")
    ] = "{}",
) -> None:
    """Serve a page, for you alone, that shows what is nearest to a picture. Until Ctrl-C."""
    from jobs.browse import browse

    browse(index, port, model, tuple(source or ()), parse_options(storage_options))


@app.command("submit", context_settings={"allow_interspersed_args": False})
def submit_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- [VERB] ARGUMENTS...",
            help="What to run there: extract (the default), reindex, verify or index, and its "
            "arguments.",
        ),
    ] = None,
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id; do not follow.")] = False,
    job_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Id of the job.  [default: Ray's choice]")
    ] = None,
    entrypoint_num_cpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="N",
            help="CPUs of the driver; it may then run on a worker.  [default: 0]",
        ),
    ] = None,
    entrypoint_resources: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Other resources of the driver.  [default: none]"),
    ] = None,
    list_jobs: Annotated[bool, typer.Option("--list", help="List the cluster's jobs.")] = False,
    stop: Annotated[
        str | None, typer.Option(metavar="ID", help="End a job; what is committed stays.")
    ] = None,
    follow: Annotated[
        str | None, typer.Option(metavar="ID", help="Show a job's log until it is over.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --list: one document.")] = False,
) -> None:
    """Run a command as a job of a Ray cluster, follow its log, and end with its exit status."""
    asked = [list_jobs, stop is not None, follow is not None, bool(arguments)]
    if sum(asked) != 1:
        raise UserError("submit: expected one of -- ARGUMENTS, --list, --stop ID, --follow ID")
    from jobs.submission import prepare

    submission = prepare(arguments) if arguments else None
    from jobs import submit as jobs_api
    from jobs.ray_jobs import answering, connect

    place = jobs_api.Place(entrypoint_num_cpus, jobs_api.parse_resources(entrypoint_resources))
    cluster = connect(address)
    with answering():
        if list_jobs:
            jobs_api.show_jobs(cluster.jobs(), as_json)
            return
        if stop is not None:
            going_on = cluster.stop(stop)
            print(f"job {stop}: {'told to end' if going_on else 'is over already'}")
            return
        if submission is not None:
            follow = jobs_api.submit(cluster, submission, place, job_id)
            if detach:
                print(follow)
                return
            print(f"tessera: job {follow}", file=sys.stderr, flush=True)
    assert follow is not None
    raise typer.Exit(jobs_api.follow_to_end(cluster, follow))


@app.command("schedule", context_settings={"allow_interspersed_args": False})
def schedule_command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGUMENTS...", help="Arguments of `tessera reindex`."),
    ] = None,
    cron: Annotated[
        str | None,
        typer.Option(metavar="FIELDS", help="When, as cron says it: '*/30 * * * *'.  [required]"),
    ] = None,
    timezone: Annotated[
        str, typer.Option(metavar="ZONE", help="Of the cron fields, as Europe/Berlin.")
    ] = "UTC",
    history: Annotated[
        Path, typer.Option(help="JSON lines: each run's start, end, changes and exit status.")
    ] = Path("tessera-schedule.jsonl"),
    address: Address = None,
    show: Annotated[bool, typer.Option("--show", help="Print the history, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --show: one document.")] = False,
) -> None:
    """Run `reindex` on a timetable, one at a time, as jobs of a Ray cluster. Until SIGTERM."""
    if show:
        from jobs.schedule import show_history
        from jobs.schedule_history import read_history

        show_history(read_history(history), as_json)
        return
    if cron is None:
        raise UserError("schedule: expected --cron, such as --cron '*/30 * * * *'")
    from jobs.timetable import Timetable

    timetable = Timetable.parse(cron, timezone)
    from jobs.schedule import run_schedule
    from jobs.submit import Place

    run_schedule(timetable, history, address, arguments or [], Place())


def main() -> None:
    claim_stderr()
    log_to_stderr()
    hide_command_line()
    try:
        app()
    except UserError as error:
        print(f"tessera: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenRunError as error:
        print(f"tessera: {printable(str(error))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
