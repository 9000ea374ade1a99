"""Reads a `--config` file: plain keys and values, whoever wrote it."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from model.errors import UserError

MAX_BYTES = 1 << 20


class PlainLoader(yaml.SafeLoader):
    """YAML's plain types. No aliases, with which a small file stands for a document of any size,
    and no key twice, of which the last would win unseen."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                problem = "a key stands twice in one mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a file.

    Raises:
        UserError: it cannot be read, or is no mapping in plain YAML. No line of it is repeated:
            it may hold a secret.
    """
    try:
        with file.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise UserError(f"{file}: more than {MAX_BYTES} bytes; is it a configuration?")
    try:
        loaded = PlainLoader(data).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{file}: not YAML: {_fault(error)}") from error
    except RecursionError as error:
        raise UserError(f"{file}: not YAML: nested too deeply") from error
    # A reader's error, or what Python's own types say of a date, number or base64 that is none.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not YAML: {type(error).__name__}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{file}: expected keys and values, got {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _fault(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    return f"{error.problem}{where}"
