"""Options that other layers define: the command line offers exactly what they have."""

from __future__ import annotations

from typing import get_args

import pyarrow as pa
import pytest

from jobs.config import ExtractOptions, load_config
from model.attention import NAMES
from model.encoder import DTYPES, FEATURES
from model.errors import UserError
from model.feature_shapes import TOKEN_FEATURES
from pipeline.records import carried_field


@pytest.mark.parametrize(("option", "offered"), [("attention", NAMES), ("dtype", tuple(DTYPES))])
def test_choices_are_those_of_the_model(option: str, offered: tuple[str, ...]) -> None:
    assert get_args(ExtractOptions.model_fields[option].annotation) == offered


def test_features_are_those_of_the_model() -> None:
    (inner, _) = get_args(ExtractOptions.model_fields["features"].annotation)
    assert get_args(inner) == tuple(FEATURES)


@pytest.mark.parametrize("format_", ["parquet", "npy"])
@pytest.mark.parametrize("feature", TOKEN_FEATURES)
def test_tokens_go_into_tars_alone(feature: str, format_: str) -> None:
    given = {"input": ("i",), "output": "o", "model": "m", "features": f"cls,{feature}"}
    with pytest.raises(UserError) as caught:
        load_config(None, {**given, "format": format_})
    says = f"command line: features: {feature} need format webdataset, got {format_}"
    assert str(caught.value) == says
    assert load_config(None, {**given, "format": "webdataset"}).features == ("cls", feature)


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(UserError, match="format: input should be 'parquet', 'webdataset' or 'npy'"):
        load_config(None, {"input": ("i",), "output": "o", "model": "m", "format": "lance"})


@pytest.mark.parametrize("name", TOKEN_FEATURES)
def test_no_member_is_carried_under_a_features_name(name: str) -> None:
    with pytest.raises(UserError, match=f"carry: expected members other than .* {name!r}"):
        load_config(None, {"input": ("i",), "output": "o", "model": "m", "carry": name})


def test_carried_members_are_named_as_samples_have_them() -> None:
    asked = {"input": ("i",), "output": "o", "model": "m", "carry": ".TXT,JSON:Url,info.json:url"}
    config = load_config(None, asked)
    assert config.carry == ("txt", "json:Url", "info.json:url")
    assert [carried_field(name).type for name in config.carry] == [pa.string()] * 3
