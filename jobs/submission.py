"""A command line made fit to run on a cluster: checked here, with all that it needs beside it.

What is submitted can be read by everybody who has the cluster's token: the entry point, its
metadata, its variables and its files. So a secret in any of them is refused.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer.main
import yaml

from jobs.config import ExtractConfig, ExtractOptions, load_config
from jobs.secrets import holds_secret, options_hold_secret
from jobs.yaml_file import read_yaml
from model.errors import UserError
from pipeline.shards import read_list
from pipeline.storage import redact, shared

VERBS = ("extract", "reindex", "verify", "index")
CONFIG = "job.yaml"
SHOWN_CHARACTERS = 400  # of INPUT in the metadata: it may list a thousand shards
DYNAMIC = frozenset({"max_tiles", "thumbnail", "max_upscale"})
DECIDING = DYNAMIC | {
    "model", "revision", "tiling", "resize", "features", "layer", "dtype", "format",
    "embedding_dtype", "image_key", "carry",
}  # fmt: skip
REFUSED = (
    "a secret in {place} would be readable to everybody who has the cluster's token; give the "
    "nodes an instance profile, or the storage's own variables or profile (such as AWS_PROFILE)"
)


@dataclass(frozen=True)
class Submission:
    """What is handed to Ray: a command, the files beside the code, and what it is told of."""

    entrypoint: str
    files: Mapping[str, bytes]
    metadata: Mapping[str, str]


def prepare(arguments: Sequence[str], verbs: Sequence[str] = VERBS) -> Submission:
    """Checks the arguments of a verb as the verb itself would, and makes them hold elsewhere.

    Local paths become absolute (a node must see the same file system); the content of `--config`
    and `@list` files travels along.

    Raises:
        UserError: the verb is none of `verbs`, an option is wrong, or one holds a secret.
    """
    verb, rest = _verb(arguments, verbs)
    parameters, given = _parsed(verb, rest)
    if options_hold_secret(given):
        raise UserError(REFUSED.format(place="the arguments"))
    files: dict[str, bytes] = {}
    config: ExtractConfig | None = None
    values = dict(given)
    if any(parameter.name == "paths" for parameter in parameters):
        config = _job(verb, given, files)
        inputs = [_entry(entry, files) for entry in config.input]
        values["paths"] = [*inputs, shared(config.output)]
        values["model"] = _model(config.model)
        values["config"] = CONFIG if CONFIG in files else None
    else:
        values |= {name: shared(given[name]) for name in ("output", "index") if name in given}
        values["source"] = [_entry(entry, files) for entry in given.get("source", ())]
        if "model" in given:
            values["model"] = _model(given["model"])
    command = ["python", "-m", "jobs.cli", verb, *_arguments(parameters, values)]
    return Submission(shlex.join(command), files, _metadata(verb, values, config))


def _verb(arguments: Sequence[str], verbs: Sequence[str]) -> tuple[str, list[str]]:
    """The leading verb; extract, where there is none."""
    if not arguments:
        raise UserError("nothing to submit: tessera submit -- INPUT OUTPUT --model M …")
    if arguments[0] in verbs:
        return arguments[0], list(arguments[1:])
    return verbs[0], list(arguments)


def _parsed(verb: str, arguments: list[str]) -> tuple[Sequence[Any], dict[str, Any]]:
    """The verb's parameters, and the values that are given for them."""
    from jobs.cli import app  # which imports this module for its own commands

    group = typer.main.get_command(app)
    command = group.commands.get(verb)  # type: ignore[attr-defined]
    if command is None:
        raise UserError(f"{verb}: this version of tessera has no such command")
    context = command.make_context(f"tessera {verb}", arguments)
    given = {
        name: value for name, value in context.params.items() if value is not None and value != ()
    }
    defaults = {parameter.name: parameter.default for parameter in command.params}
    return command.params, {k: v for k, v in given.items() if v != defaults.get(k)}


def _job(verb: str, given: Mapping[str, Any], files: dict[str, bytes]) -> ExtractConfig:
    """The whole job, as the verb would read it from its file and its arguments."""
    options = {name: given[name] for name in ExtractOptions.model_fields if name in given}
    paths = given.get("paths", ())
    if len(paths) == 1:
        raise UserError(f"{verb}: expected INPUT and OUTPUT, got one of them")
    if paths:
        options |= {"input": tuple(paths[:-1]), "output": paths[-1]}
    file = given.get("config")
    config = load_config(file, options)
    if file is not None:
        loaded = read_yaml(file)
        if options_hold_secret(loaded):
            raise UserError(REFUSED.format(place=str(file)))
        # Written anew: a comment may hold a secret, too.
        files[CONFIG] = yaml.safe_dump(loaded, allow_unicode=True, sort_keys=False).encode()
    return config


def _model(name: str) -> str:
    """A checkpoint's folder as every node sees it; an id of the hub as it is."""
    return shared(name) if Path(name).is_dir() else name


def _entry(entry: str, files: dict[str, bytes]) -> str:
    """One of INPUT, as the cluster understands it; a list travels along."""
    if not entry.startswith("@"):
        return shared(entry)
    listed = [shared(line) for line in read_list(entry)]
    if holds_secret(listed):
        raise UserError(REFUSED.format(place=entry))
    name = f"input-{len(files)}.txt"
    files[name] = "".join(f"{line}\n" for line in listed).encode()
    return f"@{name}"


def _arguments(parameters: Sequence[Any], values: Mapping[str, Any]) -> list[str]:
    """A command line that parses to these values."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in parameters:
        value = values.get(parameter.name)
        if value is None:
            continue
        listed = value if isinstance(value, list | tuple) else [value]
        if parameter.param_type_name == "argument":
            positional += map(str, listed)
        elif parameter.is_flag:
            options += [parameter.opts[0] if value else parameter.secondary_opts[0]]
        else:
            options += [f"{parameter.opts[0]}={entry}" for entry in listed]
    return [*options, *(["--", *positional] if positional else [])]


def _metadata(verb: str, values: Mapping[str, Any], config: ExtractConfig | None) -> dict[str, str]:
    known = {"verb": verb, "tessera_version": version("tessera")}
    if config is not None:
        entries = [entry if entry.startswith("@") else shared(entry) for entry in config.input]
        inputs = " ".join(map(redact, entries))
        known |= {
            "input": inputs[:SHOWN_CHARACTERS] + ("…" if len(inputs) > SHOWN_CHARACTERS else ""),
            "output": redact(shared(config.output)),
        }
        if Path(config.model).is_dir():
            known["fingerprint"] = _fingerprint(config)
        else:
            known["settings"] = _settings_digest(config)
    else:
        known |= {name: redact(values[name]) for name in ("output", "index") if name in values}
    return known


def _settings_digest(config: ExtractConfig) -> str:
    """Of what was asked for that decides the fingerprint: all that is known without the weights."""
    left_out = DYNAMIC if config.tiling != "dynamic" else frozenset()
    asked = config.model_dump(mode="json", include=set(DECIDING - left_out))
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _fingerprint(config: ExtractConfig) -> str:
    """Of a checkpoint on this machine; one of the hub would have to be fetched for it."""
    from jobs.extract import describe
    from model.checkpoint import open_checkpoint

    return describe(config, open_checkpoint(config.model, config.revision)).fingerprint
