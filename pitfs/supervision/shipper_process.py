"""The shipper's process, started and minded by `pitfs protect`: intervals, difference, link, status.

Started as `python -m pitfs.supervision.shipper_process CONFIG`. It may be killed at any time: what it missed is in
the local journal.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractAsyncContextManager
from typing import Final

import trio

from pitfs.config.production import Config, load_config
from pitfs.errors import PitfsError, UsageError
from pitfs.link.sessions.connect import SenderSession, connect
from pitfs.link.transport.tls import LinkContext
from pitfs.model.endpoint import format_endpoint
from pitfs.model.transfer import Hello
from pitfs.replication.control.requests import REQUESTS
from pitfs.replication.control.server import ShipperControl
from pitfs.replication.ports import ShipperSettings
from pitfs.replication.shipper import Shipper
from pitfs.splitter import control
from pitfs.splitter.identity import next_epoch, read_group
from pitfs.splitter.messages import SplitterClient
from pitfs.splitter.startup import journal_directory
from pitfs.supervision.heap import bound_heap
from pitfs.supervision.processes import (
    link_context,
    run_process,
    set_process_name,
    trim_heap,
    volume_specs,
    wait_for_stop,
)

NICENESS: Final = 10  # production first: the splitter, and what writes through it, go before


def shipper_settings(config: Config, hello: Hello) -> ShipperSettings:
    """What replication needs of a configuration."""
    replication = config.replication
    return ShipperSettings(
        hello=hello,
        peer=format_endpoint(replication.host, replication.port),
        journal_directory=journal_directory(config.group.state),
        capacity_bytes=config.journal.capacity_bytes,
        configured=lambda: volume_specs(load_config(config.path)),
        mode=replication.mode,
        interval_ns=replication.interval_ns,
        rate_bytes_per_s=replication.rate_bytes_per_s,
    )


async def _main(config: Config, hello: Hello, tls: LinkContext | None) -> None:
    state, replication = config.group.state, config.replication
    try:
        splitter = await SplitterClient.open(state)
        waiting_splitter = await SplitterClient.open(state)
    except OSError as error:
        raise PitfsError(f"{state}: the splitter isn't running: {os.strerror(error.errno or 0)}") from error

    def connect_replica(queue_bytes: int) -> AbstractAsyncContextManager[SenderSession]:
        return connect(
            replication.host,
            replication.port,
            tls=tls,
            hello=hello,
            rate_bytes_per_s=replication.rate_bytes_per_s,
            queue_bytes=queue_bytes,
            window_bytes=replication.window_bytes,
        )

    shipper = Shipper(shipper_settings(config, hello), splitter, waiting_splitter, connect_replica)
    handler = ShipperControl(shipper, state, config.group.name)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_request, nursery.cancel_scope)
            await nursery.start(control.serve, state, control.SHIPPER_SOCKET, REQUESTS.decode, handler.handle)
            nursery.start_soon(shipper.tick)
            nursery.start_soon(shipper.run)
            nursery.start_soon(shipper.acks.run)
            nursery.start_soon(shipper.tend_digests)
            nursery.start_soon(trim_heap)
            print("ready", flush=True)
    except* trio.BrokenResourceError:
        raise PitfsError(f"{state}: the splitter ended") from None
    finally:
        shipper.close()


async def _stop_on_request(scope: trio.CancelScope) -> None:
    await wait_for_stop()
    scope.cancel()


def serve(config: Config) -> int:
    """Ships until SIGTERM; returns the exit code."""
    set_process_name("pitfs-shipper")
    if config.replication.mode != "sync":  # there writes wait for it
        os.nice(NICENESS)
    bound_heap()
    group = read_group(config.group.state)
    if group is None:
        raise UsageError(f"{config.group.state}: no state of a group: it is made by 'pitfs protect'")
    tls = link_context(config)
    epoch = next_epoch(config.group.state, time.time_ns() // 1_000_000)
    hello = Hello(group.group, group.history, group.volumes, epoch.epoch, epoch.instance)
    trio.run(_main, config, hello, tls)
    return 0


if __name__ == "__main__":
    sys.exit(run_process(serve))
