"""The file of `pitfs receive --grants`: whose certificates may write which group.

    [groups]
    db1 = ["db1.example.org", "sha256:5f36…"]

Each is a name in the certificate, or its fingerprint.
"""

from __future__ import annotations

import re

from pitfs.config.table import Table, parse_table, read_text


def load_grants(path: str) -> dict[str, frozenset[str]]:
    """Reads the file: names and fingerprints (lower case, without colons) by group.

    Raises:
        ConfigError: it can't be read, isn't TOML, or has something else in it.
    """
    top = parse_table(read_text(path), path)
    top.only(("groups",))
    groups = top.table("groups")
    return {
        groups.checked_name(name, name): frozenset(_identity(groups, name, text) for text in groups.texts(name))
        for name in groups.values
    }


def _identity(groups: Table, name: str, text: str) -> str:
    prefix, colon, digits = text.partition(":")
    if prefix.lower() != "sha256" or not colon:
        return text
    digits = digits.replace(":", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        groups.fail(name, "a fingerprint is sha256: and 64 hex digits, as of openssl x509 -fingerprint -sha256")
    return f"sha256:{digits}"
