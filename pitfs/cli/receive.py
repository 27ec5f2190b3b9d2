"""`pitfs receive`: receives what production hosts send, into one store for each group."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from pitfs.cli.common.parser import add_tls_files, server_tls
from pitfs.errors import PitfsError, UsageError
from pitfs.model.units import format_bytes
from pitfs.supervision.report import one_line

if TYPE_CHECKING:
    from pitfs.link.sessions.receiver import ReadGrants
    from pitfs.link.transport.tls import LinkContext

DESCRIPTION: Final = (
    "Receives replication of any number of groups; the store of each is DIR/GROUP. Runs in "
    "the foreground, prints 'ready' when it listens, ends on SIGTERM; what is under way resumes later. "
    "A minute after its start, and then each hour, it prunes the stores that have a policy (pitfs retention)."
)
EXAMPLES: Final = """\
examples:
  pitfs receive --root /srv/pitfs --listen 127.0.0.1:7420 --insecure
  pitfs receive --root /srv/pitfs --listen [::]:7420 \\
      --certificate replica.pem --key replica.key --authority ca.pem"""


FIRST_PRUNE_S: Final = 60.0  # after a start, which has enough to do
PRUNE_EVERY_S: Final = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", metavar="DIR", required=True, help="directory of the stores; made if missing")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", required=True, help="address to listen at; port 0 takes a free one"
    )
    add_tls_files(parser, "senders")
    parser.add_argument(
        "--grants", metavar="FILE", help="TOML file: whose certificates may write which groups; read at each connection"
    )
    parser.add_argument(
        "--window", metavar="SIZE", default="32MiB",
        help="largest window of the compression for a connection, 1MiB to 128MiB (default %(default)s): "
        "memory; many connections get less",
    )  # fmt: skip
    parser.add_argument("--insecure", action="store_true", help="no TLS; loopback addresses only")


def run(args: argparse.Namespace) -> int:
    import trio

    from pitfs.config.grants import load_grants
    from pitfs.config.quantities import WINDOW
    from pitfs.supervision.heap import bound_heap
    from pitfs.supervision.listening import parse_address
    from pitfs.supervision.processes import set_up_daemon_logging
    from pitfs.supervision.service import run_until_signal

    bound_heap()
    try:
        window_bytes = WINDOW.parse(args.window)
    except ValueError as error:
        raise UsageError(f"--window {error}") from None
    host, port = parse_address(args.listen)
    tls = server_tls(args, args.insecure, host)
    read_grants = None
    if args.grants is not None:
        if tls is None:
            raise UsageError("--grants names certificates: it needs --certificate, --key and --authority")
        read_grants = partial(load_grants, args.grants)
        read_grants()  # reports its errors now, not when somebody connects
    root = _make_root(args.root)
    set_up_daemon_logging(args.verbose)
    trio.run(run_until_signal, partial(_receive, root, host, port, tls, read_grants, window_bytes))
    return 0


def _make_root(path: str) -> str:
    root = os.path.abspath(path)
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"{root}: isn't a directory") from None
    except OSError as error:
        raise PitfsError(f"{root}: can't be made: {error.strerror}") from None
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        raise PitfsError(f"{root}: can't be written to: stores are made there")
    return root


async def _receive(
    root: str, host: str, port: int, tls: LinkContext | None, read_grants: ReadGrants | None, window_bytes: int
) -> None:
    import logging

    import trio

    from pitfs.link.sessions.connect import Limits, serve
    from pitfs.model.endpoint import format_endpoint
    from pitfs.store.check.heal import Healer
    from pitfs.store.ingest import Ingest
    from pitfs.store.opening import check_sender
    from pitfs.supervision.listening import listen
    from pitfs.supervision.processes import trim_heap
    from pitfs.supervision.scrub import scrub_stores
    from pitfs.supervision.service import notify_ready

    log = logging.getLogger(__name__)
    listeners = await listen(host, port, "pitfs receive")
    for listener in listeners:
        log.info("listening at %s, stores in %s", format_endpoint(*listener.socket.getsockname()[:2]), root)
    notify_ready()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trim_heap)
        nursery.start_soon(_prune_hourly, root)
        nursery.start_soon(scrub_stores, root)
        limits = Limits(window_bytes=window_bytes)
        check, opened = partial(check_sender, root), partial(Ingest, root)
        healer = partial(Healer, root)
        await serve(
            listeners, opened, tls=tls, limits=limits, read_grants=read_grants, check_sender=check, open_healer=healer
        )


async def _prune_hourly(root: str) -> None:
    """Applies the policies of the stores that have one, one after the other; what goes wrong is one line in the log."""
    import glob

    import trio

    await trio.sleep(FIRST_PRUNE_S)
    while True:
        for path in sorted(glob.glob(os.path.join(glob.escape(root), "*", "retention.json"))):
            # A kill is safe at any point: an end of the receiver doesn't wait.
            await trio.to_thread.run_sync(_prune, os.path.dirname(path), abandon_on_cancel=True)
        await trio.sleep(PRUNE_EVERY_S)


def _prune(path: str) -> None:
    import logging

    from pitfs.store.retention.plan import Retention

    log = logging.getLogger(__name__)
    try:
        with Retention(path, changes=True) as retention:
            done = retention.apply()
    except Exception as error:
        log.error("not pruned: %s", one_line(str(error) if isinstance(error, PitfsError) else f"{path}: {error!r}"))
        return
    if done.done:
        log.info("%s: pruned: %s freed", path, format_bytes(done.freed_bytes))
    if retention.lacking_bytes:
        log.warning("%s: %s", path, retention.lack())
