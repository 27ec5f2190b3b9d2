"""The options that name a server's PEM files, and the TLS context of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from pitfs.errors import UsageError

if TYPE_CHECKING:
    from pitfs.link.transport.tls import LinkContext

OPTIONS: Final = ("certificate", "key", "authority")


def add_tls_files(parser: argparse.ArgumentParser, peers: str) -> None:
    """The options; `peers` are those who connect."""
    meanings = "this host's certificate", "its key", f"the authority whose certificates {peers} show"
    for option, meaning in zip(OPTIONS, meanings, strict=True):
        parser.add_argument(f"--{option}", metavar="FILE", help=f"PEM file of {meaning}")


def given_tls_files(args: argparse.Namespace) -> list[str]:
    """Those of these options that were given."""
    return [f"--{option}" for option in OPTIONS if getattr(args, option) is not None]


def tls_context(args: argparse.Namespace, otherwise: str) -> LinkContext:
    """The context of all three files.

    Args:
        otherwise: what the user may do instead, for the error.

    Raises:
        UsageError: a file is missing or invalid.
    """
    from pitfs.link.transport.tls import server_context

    missing = ", ".join(f"--{option}" for option in OPTIONS if getattr(args, option) is None)
    if missing:
        raise UsageError(f"{missing} missing: give all three files, or {otherwise}")
    return server_context(args.certificate, args.key, args.authority)
