"""A TOML table that gives its values by type, and errors with file, line and key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from typing import Any, Final, Never, TypeVar

from pitfs.config.quantities import Quantity, shorten
from pitfs.errors import ConfigError, PermissionDeniedError
from pitfs.model.group import NAME_RULE, is_name

_KINDS: Final = {str: "text in quotes", int: "an integer", bool: "true or false", dict: "a table"}
MAX_FILE_BYTES: Final = 1 << 20  # a configuration is a page; more is the wrong file

T = TypeVar("T")


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        ConfigError: it can't be read, is too large, or isn't text.
        PermissionDeniedError: this user may not read it.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except PermissionError:
        raise PermissionDeniedError(path) from None
    except (OSError, ValueError) as error:
        raise ConfigError(path, "", f"can't be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(path, "", f"is larger than {MAX_FILE_BYTES >> 20} MiB: not a configuration of pitfs")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(path, f"line {line}", "isn't UTF-8 text") from error


def parse_table(text: str, path: str) -> Table:
    """The document's top table; `path` is for messages. Raises ConfigError: it isn't TOML."""
    try:
        document = tomllib.loads(text)
    except RecursionError as error:
        raise ConfigError(path, "", "isn't valid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or a number with more digits than Python converts
        problem = " ".join(str(error).split())
        place = re.search(r" \(at (line [0-9]+, column [0-9]+|end of document)\)$", problem)
        where = place[1] if place else ""
        problem = problem[: place.start()] if place else problem
        raise ConfigError(path, where, f"isn't valid TOML: {problem}") from error
    return Table(TomlSource(path, text), (), document)


class TomlSource:
    """The text of a file, to find the lines of keys when there is an error."""

    def __init__(self, path: str, text: str) -> None:
        self.path, self._text = path, text

    def line(self, keys: tuple[str, ...]) -> int | None:
        """Line of the key or, if it isn't found (inline tables), of the table around it."""
        if '"""' in self._text or "'''" in self._text:
            return None  # lines of a long string may look like keys, and a wrong line is worse than none
        lines: dict[str, int] = {}
        prefix = ""
        for number, line in enumerate(self._text.split("\n"), 1):
            if header := re.match(r"\s*\[([^\[\]]+)\]", line):
                name = prefix = _dotted(header[1])
            elif pair := re.match(r"\s*([A-Za-z0-9_.\"' -]+?)\s*=", line):
                name = _dotted(f"{prefix}.{pair[1]}" if prefix else pair[1])
            else:
                continue
            lines.setdefault(name, number)
        for length in range(len(keys), 0, -1):
            if (found := lines.get(".".join(keys[:length]))) is not None:
                return found
        return None


def _dotted(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


class Table:
    """A table of the document: takes values out by type; every failure names file, line and key."""

    def __init__(self, source: TomlSource, keys: tuple[str, ...], values: Mapping[str, Any]) -> None:
        self._source, self._keys, self.values = source, keys, values

    def fail(self, key: str, problem: str) -> Never:
        keys = (*self._keys, key) if key else self._keys
        line = self._source.line(keys)
        name = ".".join(part if is_name(part) else shorten(part) for part in keys)
        where = ", ".join(part for part in (f"line {line}" if line else "", name) if part)
        raise ConfigError(self._source.path, where, problem)

    def only(self, known: tuple[str, ...]) -> None:
        for key, value in self.values.items():
            if key in known:
                continue
            close = difflib.get_close_matches(key[:64], known, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
            self.fail(key, f"unknown {'table' if isinstance(value, dict) else 'key'}; {hint}")

    def table(self, key: str, known: tuple[str, ...] | None = None, *, optional: bool = False) -> Table:
        """The table within; `known`: its keys, None where a user chooses them."""
        if key not in self.values and not optional:
            self.fail("", f"the table [{'.'.join((*self._keys, key))}] is missing")
        table = Table(self._source, (*self._keys, key), self.get(key, dict, {}))
        if known is not None:
            table.only(known)
        return table

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.values.get(key, default)
        if value is None:  # TOML has no null
            self.fail(key, "is missing")
        if type(value) is not kind:  # bool is an int to Python, not to TOML
            self.fail(key, f"must be {_KINDS[kind]}, not {_KINDS.get(type(value), f'a {type(value).__name__}')}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, str, default)
        if not value or not value.isprintable():
            self.fail(key, "is empty" if not value else "has characters that can't be printed")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of at least one text."""
        values = self.values[key]
        if not isinstance(values, list) or not values or not all(isinstance(each, str) for each in values):
            self.fail(key, 'must be a list of texts in quotes, as in ["one", "two"]')
        return values

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in choices:
            close = difflib.get_close_matches(value[:64], choices, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it is one of {', '.join(choices)}"
            self.fail(key, f"{shorten(value)} isn't known; {hint}")
        return value

    def absolute_path(self, key: str) -> str:
        value = self.text(key)
        if not value.startswith("/"):
            self.fail(key, f"{shorten(value)} must be an absolute path, beginning with /")
        if len(value.encode()) >= 4096:
            self.fail(key, "is longer than a path can be")
        return value

    def checked_name(self, key: str, name: str) -> str:
        if not is_name(name):
            self.fail(key, f"{shorten(name)} isn't a valid name: {NAME_RULE}")
        return name

    def quantity(self, key: str, quantity: Quantity, default: int | None = None) -> int:
        if key not in self.values and default is not None:
            return default
        value = self.values.get(key)
        if type(value) is float or (type(value) is int and not quantity.without_unit):
            self.fail(key, f"needs a unit, as {quantity.example}")
        try:
            return quantity.parse(value if type(value) is int else self.text(key))
        except ValueError as error:
            self.fail(key, str(error))
