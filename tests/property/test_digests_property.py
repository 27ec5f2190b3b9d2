"""Whatever comes between, each digest that arrives is that of the naive model."""

from __future__ import annotations

import contextlib
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.errors import LinkError
from pitfs.journal.reader import Copy
from pitfs.model.digest import digest_of
from pitfs.model.transfer import Checkpoint, Data
from pitfs.replication import digests as digests_module
from pitfs.replication import full_sync
from pitfs.replication.digests import VolumeDigests
from pitfs.replication.phases import Phase
from pitfs.store.store import Store
from tests.helpers.bypass import Bypassing

STEPS = 60
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
        save = VolumeDigests._save

        def saving(digests: VolumeDigests) -> None:
            save(digests)
            self.durable = {each: Path(directory, each).read_bytes() for each in os.listdir(directory)}

        directory = os.path.join(self.pipeline.state, "digests")
        self.directory = directory
        monkeypatch.setattr(VolumeDigests, "_save", saving)
        monkeypatch.setattr(digests_module, "EVERY_S", 0.0)
        monkeypatch.setattr(digests_module, "RETRY_S", 0.0)
        monkeypatch.setattr(digests_module, "FILL_BYTES", 16 * BLOCK)
        monkeypatch.setattr(digests_module, "BATCH_ROWS", 5)
        monkeypatch.setattr(digests_module, "MAX_PENDING_ROWS", 20)
        monkeypatch.setattr(digests_module, "SAVE_S", 0.0 if seed % 3 else 1e9)

    def check_digests(self) -> None:
        store = Store.open(self.pipeline.ingest.path)
        for snapshot in store.snapshots():
            found = store.digest(0, snapshot.time_ns)
            if found is not None and found[0].id == snapshot.id:
                self.seen.add(snapshot.seq)
                assert found[1] == naive_digest(self.at[snapshot.seq]), snapshot
        store.close()

    async def ship_one(self) -> None:
        """The next diff or copy, if there is one; the next ones have to wait."""
        if not self.splitter.state.bypass_cause:
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


async def step(parts: Digesting, saved: list[Path]) -> None:
    """One thing that happens."""
    random, status = parts.pipeline.random, parts.shipper.status
    match int(random.integers(20)):
        case 0 | 1 | 2:
            parts.scatter(int(random.integers(1, 8)))
        case 3 | 4:
            if not parts.splitter.state.bypass_cause:
                parts.mark()
        case 5:
            if random.random() < 0.4:
                parts.overflow(int(random.integers(1, 6)))
        case 6:
            await parts.room()
        case 7 | 8 | 9:
            parts.during = lambda: parts.scatter(int(random.integers(3)))
            await parts.ship_all()
            parts.during = lambda: None
        case 10:
            if random.random() < 0.3:
                parts.restart(clean=random.random() < 0.7)
            await parts.connect_anew()
        case 11:
            parts.kill_shipper(random.random() < 0.5)
            await parts.connect_anew()
        case 12:
            parts.restart_shipper()  # in order
            await parts.connect_anew()
        case 13:
            if not saved:
                saved.append(parts.save_replica())
            elif random.random() < 0.3:
                parts.restore_replica(saved.pop())
                await parts.connect_anew()
        case 14:
            if status.phase is Phase.WAITING and parts.session.welcome.mark:
                await parts.ship_all()
                if parts.shipper.status.phase is Phase.WAITING and not parts.splitter.state.bypass_cause:
                    await stream_some(parts)
        case 15:
            parts.during = lambda: parts.scatter(int(random.integers(3)))
            parts.read_some(int(random.integers(8)))
            parts.during = lambda: None
        case 16 | 17:
            await parts.ship_cut_off()
            if random.random() < 0.5:
                parts.kill_shipper(random.random() < 0.5)
            await parts.connect_anew()
        case 18:
            for _ in range(3):
                parts.scatter(2)
                if not parts.splitter.state.bypass_cause:
                    parts.mark()
            with contextlib.suppress(LinkError):
                await parts.ship_one()
        case 19:  # as before an upgrade
            parts.kill_shipper(False)
            shutil.rmtree(parts.directory, ignore_errors=True)
            await parts.connect_anew()
            if random.random() < 0.7:
                parts.read_some(8)


async def stream_some(parts: Digesting) -> None:
    """Streams writes and marks, and leaves the stream somewhere."""
    shipper = parts.shipper
    shipper.stream.begin(parts.session)
    for _ in range(int(parts.pipeline.random.integers(1, 5))):
        parts.scatter(2)
        if parts.pipeline.random.random() < 0.5 and not parts.splitter.state.bypass_cause:
            parts.mark()
        if await shipper.stream.pump(60.0):
            break
    await shipper.stream.finish()
    shipper.status.enter(Phase.WAITING)


@pytest.mark.parametrize("seed", range(24))
async def test_each_digest_that_arrives_is_that_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr("pitfs.replication.full_sync.STRETCH_BYTES", 65536)
    monkeypatch.setattr("pitfs.replication.full_sync.CHECKPOINT_BYTES", 65536)
    parts = Digesting(tmp_path, monkeypatch, seed)
    await parts.locate()
    if seed % 2:
        await parts.ship_all()
    saved: list[Path] = []
    for _ in range(STEPS):
        await step(parts, saved)
        parts.check_digests()
    await parts.settle()
    parts.read_some(20)
    for _ in range(2):
        parts.scatter(1)
        parts.mark()
        await parts.ship_all()
        parts.read_some(20)
    parts.check_digests()
    assert parts.splitter.state.seq in parts.seen
    parts.close()
