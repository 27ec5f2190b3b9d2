"""A shipper that keeps digests, beside the naive model."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.errors import LinkError
from pitfs.journal import checksum_files
from pitfs.journal import digests as digests_module
from pitfs.journal.reader import Copy
from pitfs.model.digest import digest_of
from pitfs.model.transfer import Checkpoint, Data
from pitfs.replication import full_sync
from pitfs.store.store import Store
from tests.helpers.bypass import Bypassing

BLOCK = 4096


def naive_digest(image: bytes, size: int = BLOCK) -> int:
    """Of all blocks, one by one."""
    total = 0
    for block, at in enumerate(range(0, len(image), size)):
        content = image[at : at + size].ljust(size, b"\0")
        if any(content):
            total += digest_of(np.array([block]), np.array([xxh3_64_intdigest(content)], dtype=np.uint64))
    return total % (1 << 128)


class Digesting(Bypassing):
    """`seen`: seq of each snapshot that had a digest. `durable`: the files of checksums as of the last save."""

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        super().__init__(tmp, monkeypatch, seed)
        self.seen: set[int] = set()
        self.durable: dict[str, bytes] = {}
        replace = digests_module.durable_replace

        def replacing(path: str, content: bytes) -> None:
            self.durable = {each: Path(directory, each).read_bytes() for each in os.listdir(directory)}
            replace(path, content)

        directory = os.path.join(self.pipeline.state, "digests")
        self.directory = directory
        monkeypatch.setattr(digests_module, "durable_replace", replacing)
        monkeypatch.setattr(digests_module, "EVERY_S", 0.0)
        monkeypatch.setattr(digests_module, "RETRY_S", 0.0)
        monkeypatch.setattr(digests_module, "FILL_BYTES", 16 * BLOCK)
        monkeypatch.setattr(checksum_files, "BATCH_ROWS", 5)
        monkeypatch.setattr(digests_module, "MAX_PENDING_ROWS", 20)
        monkeypatch.setattr(digests_module, "SAVE_S", 0.0 if seed % 3 else 1e9)

    def check_digests(self) -> None:
        self.shipper.digests.save()
        store = Store.open(self.pipeline.ingest.path)
        for snapshot in store.snapshots():
            found = store.digest(0, snapshot.time_ns)
            if found is not None and found[0].id == snapshot.id:
                self.seen.add(snapshot.seq)
                assert found[1] == naive_digest(self.at[snapshot.seq]), snapshot
        store.close()

    async def ship_one(self) -> None:
        """The next diff or copy, if there is one; the next ones have to wait."""
        if not self.splitter.state.bypass_cause or self.shipper.cursor.reader.location < self.splitter.journal.tail:
            item = await self.shipper.cursor.next_item(self.session, wait=False)
            if isinstance(item, Copy):
                await self.shipper.full_sync.ship(self.session, item)
            elif item is not None:
                await self.shipper.ship_interval(self.session, item)

    async def ship_cut_off(self) -> None:
        """The link breaks on the way, perhaps before the end."""
        send, left = self.session.send, int(self.pipeline.random.integers(1, 12))

        async def sending(frame: Data | Checkpoint) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise ConnectionError
            await send(frame)

        self.session.send = sending  # type: ignore[method-assign]
        with contextlib.suppress(ConnectionError, LinkError):
            await self.ship_one()
        self.session.send = send  # type: ignore[method-assign]

    def kill_shipper(self, power_loss: bool) -> None:
        """Without the order to save. A power loss also takes some of what was written since the last save."""
        self.shipper.digests._is_resumed = False
        self.shipper.digests._position = None
        self.restart_shipper()
        if power_loss and os.path.exists(self.directory):
            for name in set(os.listdir(self.directory)) & set(self.durable) - {"position"}:
                now, then = (np.frombuffer(each, "<u8") for each in
                             (Path(self.directory, name).read_bytes(), self.durable[name]))
                mixed = np.where(self.pipeline.random.random(len(now)) < 0.5, now, then)
                Path(self.directory, name).write_bytes(mixed.tobytes())

    def read_some(self, count: int) -> None:
        """In the background."""
        read = partial(full_sync.read_stretch, self.pipeline.volumes, [each.fd for each in self.splitter.volumes])

        def seq() -> int | None:
            state = self.splitter.state
            return None if state.bypass_cause or state.copy is not None else state.seq

        for _ in range(count):
            self.shipper.digests.fill(read, seq)
