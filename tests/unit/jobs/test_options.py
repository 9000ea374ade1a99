"""Options that other layers define: the command line offers exactly what they have."""

from __future__ import annotations

from typing import get_args

import pytest

from jobs.config import ExtractOptions
from model.attention import NAMES
from model.encoder import DTYPES, FEATURES


@pytest.mark.parametrize(("option", "offered"), [("attention", NAMES), ("dtype", tuple(DTYPES))])
def test_choices_are_those_of_the_model(option: str, offered: tuple[str, ...]) -> None:
    assert get_args(ExtractOptions.model_fields[option].annotation) == offered


def test_features_are_those_of_the_model() -> None:
    (inner, _) = get_args(ExtractOptions.model_fields["features"].annotation)
    assert get_args(inner) == tuple(FEATURES)
