"""Credentials in what users type: recognised, warned about, and kept out of process lists."""

from __future__ import annotations

import json
import logging
import re
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.storage import redact

logger = logging.getLogger(__name__)

OPTION = "--storage-options"
# Names of credentials in fsspec's options (s3fs, gcsfs, adlfs, http) and in signed URLs.
SECRET_NAME = re.compile(
    r"secret|passw|token|credential|signature|account_?key|api_?key|private|connection_string"
    r"|authorization|\bsig\b|\bsas\b",
    re.IGNORECASE,
)


def holds_secret(value: object) -> bool:
    """Whether a credential stands in storage options, or in a URL among the values."""
    if isinstance(value, Mapping):
        return any(
            holds_secret(inner) or (SECRET_NAME.search(str(name)) and inner not in (None, "", {}))
            for name, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return any(map(holds_secret, value))
    if not isinstance(value, str) or "://" not in value:
        return False
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return ":" in parts.netloc.rpartition("@")[0] or SECRET_NAME.search(parts.query) is not None


def options_hold_secret(given: Mapping[str, Any]) -> bool:
    """The same of options as they were typed: storage options may be a JSON object in text."""
    return holds_secret(
        {**given, "storage_options": options_as_typed(given.get("storage_options"))}
    )


def warn_of_command_line(given: Mapping[str, Any]) -> None:
    """Says once that other users of this machine read a secret on the command line."""
    if options_hold_secret(given):
        logger.warning(
            "a secret on the command line can be read by every user of this machine; use the "
            "storage's own variables or profile (such as AWS_PROFILE), or storage_options in a "
            "--config file with mode 600"
        )


def warn_of_readable_file(file: Path, loaded: Mapping[str, Any]) -> None:
    """Says once that a file with a secret in it is open to others."""
    if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH) and options_hold_secret(loaded):
        logger.warning("%s: holds a secret and other users may read it; chmod 600 %s", file, file)


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line as it may be shown: no storage options, no credentials in URLs."""
    shown: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if shown and shown[-1] == OPTION:
            shown.append("…")
        elif name == OPTION and equals:
            shown.append(f"{OPTION}=…")
        elif name.startswith("--") and equals:
            shown.append(f"{name}={redact(value)}")
        else:
            shown.append(redact(argument))
    return shown


def hide_command_line() -> None:
    """Takes the secrets of this process's command line out of `ps`, and out of what Ray records:
    it keeps the driver's command line in its table of jobs, for every client to see."""
    arguments = sys.argv[1:]
    shown = without_secrets(arguments)
    if shown != arguments:
        from ray._raylet import setproctitle  # type: ignore[attr-defined]

        setproctitle(" ".join(["tessera", *shown]))


def options_as_typed(options: object) -> object:
    """Storage options as they were typed; what is no JSON is refused elsewhere."""
    if not isinstance(options, str):
        return options
    try:
        return json.loads(options)
    except (ValueError, RecursionError):
        return None
