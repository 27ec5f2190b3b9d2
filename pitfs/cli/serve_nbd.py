"""`pitfs serve-nbd`: the instants of a store as NBD exports, for hosts and virtual machines elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import os
from functools import partial
from typing import TYPE_CHECKING, Final

from pitfs.cli.common.parser import add_store, add_tls_files, server_tls

if TYPE_CHECKING:
    import trio

    from pitfs.link.transport.streams import TlsStream
    from pitfs.link.transport.tls import LinkContext
    from pitfs.store.pins.pins import Pins
    from pitfs.store.store import Store

DESCRIPTION: Final = (
    "Serves every instant of a store by the NBD protocol, read-only. The name of an export is the "
    "path in the mount without the suffix of images: INSTANT/VOLUME, latest/VOLUME, 5m-ago/VOLUME, "
    "bookmarks/NAME/VOLUME. A time is resolved when a client connects, and stays that instant for it. "
    "Listed are latest and the newest 100 snapshots. Runs in the foreground, prints 'ready' when it listens, "
    "ends on SIGTERM. Without TLS it listens on loopback or a unix socket only."
)
EXAMPLES: Final = """\
examples:
  pitfs serve-nbd /srv/pitfs/db1 --unix /run/pitfs-nbd.sock
  pitfs serve-nbd /srv/pitfs/db1 --listen 127.0.0.1:10809
  pitfs serve-nbd /srv/pitfs/db1 --listen [::]:10809 \\
      --certificate replica.pem --key replica.key --authority ca.pem

clients:
  nbdinfo --list nbd://127.0.0.1
  nbdcopy nbd://127.0.0.1/latest/root root.img
  qemu-img convert -p -O qcow2 nbd+unix:///5m-ago/root?socket=/run/pitfs-nbd.sock root.qcow2
  nbdfuse --readonly /mnt/root nbd://127.0.0.1/bookmarks/before-upgrade/root"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "--listen", metavar="HOST:PORT", help="address to listen at; port 0 takes a free one; NBD's is 10809"
    )
    place.add_argument(
        "--unix", metavar="PATH", help="unix socket to listen at: made for this user alone, removed at the end"
    )
    add_tls_files(parser, "clients")


def run(args: argparse.Namespace) -> int:
    import trio

    from pitfs.cli.common.pins import open_pinned
    from pitfs.supervision.listening import parse_address
    from pitfs.supervision.processes import set_up_daemon_logging
    from pitfs.supervision.service import run_until_signal

    address = parse_address(args.listen) if args.listen is not None else None
    tls = server_tls(args, None, address[0] if address is not None else None)
    set_up_daemon_logging(args.verbose)
    with open_pinned(args.store, f"serve-nbd {args.listen or os.path.realpath(args.unix)}") as (store, pins):
        trio.run(run_until_signal, partial(_serve, store, pins, address, args.unix, tls))
    return 0


async def _serve(
    store: Store, pins: Pins, address: tuple[str, int] | None, path: str, tls: LinkContext | None
) -> None:
    import logging
    import time

    from pitfs.model.endpoint import format_endpoint
    from pitfs.nbd.exports import Exports
    from pitfs.nbd.server import serve
    from pitfs.supervision.listening import listen, listen_unix
    from pitfs.supervision.service import notify_ready
    from pitfs.view.tree import Tree

    log = logging.getLogger(__name__)
    exports = Exports(store, Tree(store, time.time_ns), pins)
    with contextlib.ExitStack() as stack:
        if address is None:
            listeners = [stack.enter_context(listen_unix(path))]
        else:
            listeners = await listen(*address, "pitfs serve-nbd")
        for listener in listeners:
            name = listener.socket.getsockname()
            log.info("listening at %s", name if isinstance(name, str) else format_endpoint(*name[:2]))
        notify_ready()
        await serve(listeners, exports, None if tls is None else partial(_start_tls, store.group, tls))


async def _start_tls(group: str, tls: LinkContext, inner: trio.SocketStream) -> TlsStream:
    """TLS with a client whose certificate grants this group, or says nothing of groups.

    Raises:
        LinkError: its certificate is missing, invalid, or for other groups.
    """
    import ssl

    import trio

    from pitfs.errors import LinkError, LinkRefusedError
    from pitfs.link.sessions.failures import describe_os_error, tls_error
    from pitfs.link.transport.streams import TlsStream
    from pitfs.link.transport.tls import is_granted, names_of
    from pitfs.nbd.stream import peer_name

    stream = TlsStream(inner, tls)
    try:
        await stream.do_handshake()
    except ssl.SSLError as error:
        raise tls_error(peer_name(inner), error, tls) from None
    except (EOFError, OSError, trio.BrokenResourceError) as error:
        raise LinkError(f"in the TLS handshake: {describe_os_error(error) or 'it left'}") from None
    certificate = stream.peer_certificate()
    if not is_granted(certificate, group):
        raise LinkRefusedError(f"the certificate of {names_of(certificate)} grants other groups, not {group}")
    return stream
