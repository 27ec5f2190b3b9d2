"""`pitfs protect`: serves volumes and replicates them, by two processes that it keeps running."""

from __future__ import annotations

import argparse
from typing import Final

from pitfs.cli.common.parser import add_config

DESCRIPTION: Final = (
    "Serves each volume of CONFIG as a writable file, journals every write and replicates it. "
    "Runs in the foreground, prints 'ready' when writes are accepted, ends in order on SIGTERM. While a volume is in "
    "use it says by whom and waits for them; a second signal ends it in any case. Starting it again after any stop "
    "goes on where it was."
)
EXAMPLES: Final = "examples:\n  pitfs protect /etc/pitfs/db1.toml\n  systemctl start pitfs-protect@db1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    import trio

    from pitfs.config.production import load_config
    from pitfs.supervision.minder import Minder
    from pitfs.supervision.processes import link_context, set_process_name, set_up_daemon_logging

    config = load_config(args.config)
    link_context(config)  # errors of the certificates before anything starts
    set_up_daemon_logging(args.verbose)
    set_process_name("pitfs-protect")
    return trio.run(Minder(config, args.verbose).run)
