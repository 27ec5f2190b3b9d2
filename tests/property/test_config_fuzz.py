"""Any text gives a configuration or a ConfigError of one line: never another exception."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pitfs.config.production import Config, load_config, parse_config
from pitfs.errors import ConfigError
from tests.unit.test_config import FULL

WORDS = ("[group]", "[volumes.a]", "volumes", "[replication]", "name", "state", "backing", "replica", "rate")
TEXTS = (
    '"60s"',
    '"a:1"',
    '"/x"',
    '"\\u0000"',
    '"é"',
    '"1e9GiB"',
    "true",
    "inf",
    "nan",
    "1979-05-27",
    "[]",
    "{}",
)
VALUES = st.one_of(
    st.sampled_from(TEXTS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=80).map(lambda text: '"' + text.replace("\\", "").replace('"', "") + '"'),
)


def outcome(text: str) -> Config | None:
    try:
        return parse_config(text, "x.toml")
    except ConfigError as error:
        assert "\n" not in str(error)
        return None


@given(
    st.one_of(st.text(), st.lists(st.sampled_from((*WORDS, *TEXTS, "=", "\n", ".", "[", "]"))).map(" ".join))
)
@example("[[group]]")
@example("group = 1")
@example("[volumes]\na = 1")
def test_any_text_gives_a_configuration_or_a_config_error(text: str) -> None:
    assert outcome(text) is None


@given(st.integers(0, FULL.count("\n") - 1), VALUES)
def test_any_value_at_any_key_gives_a_configuration_or_a_config_error(number: int, value: str) -> None:
    lines = FULL.split("\n")
    lines[number] = lines[number].partition("=")[0] + "= " + value
    outcome("\n".join(lines))


@given(st.integers(0, len(FULL)), st.integers(0, 40), st.text(max_size=10))
def test_any_edit_gives_a_configuration_or_a_config_error(start: int, size: int, text: str) -> None:
    outcome(FULL[:start] + text + FULL[start + size :])


@given(st.binary())
def test_any_bytes_give_a_configuration_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(content)
    try:
        load_config(str(path))
    except ConfigError as error:
        assert "\n" not in str(error)
