"""Damaged stores are healed from production: splitter, shipper, link, receiver and store in this process."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trio

from pitfs.cli.main import main
from pitfs.link.sessions import receiver
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.check.heal import _make_frames, _production_listens
from pitfs.store.index.maps import node_loader
from pitfs.store.objects.damage import Damage, DamageLog
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, OBJECTS, ObjectName
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.opening import changes_locked, read_store_info
from pitfs.store.retention.removal import Removal
from pitfs.store.store import Store
from pitfs.store.transfer.writable_store import WritableStore
from tests.helpers.linked import Linked, linked
from tests.helpers.netlink import Proxy
from tests.helpers.pipeline import Pipeline
from tests.helpers.stores import object_files, read_image

SIZES = [40_000, 20_000]
BLOCK_SIZES = [4096, 512]
WAIT_S = 20.0


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(receiver, "LOOK_S", 0.02)
    return Pipeline(tmp_path, SIZES, BLOCK_SIZES, seed=3, filled=True)


def store_of(pipeline: Pipeline) -> str:
    return str(pipeline.tmp / "g")


def contents(pipeline: Pipeline) -> dict[tuple[str, int], Damage]:
    """All contents that any state has, by their place."""
    store, found = Store.open(store_of(pipeline)), dict[tuple[str, int], Damage]()
    layout = store.objects.layout
    for seq in range(len(pipeline.states)):
        resolution = store.at_seq(seq)
        for index, volume in enumerate(store.volumes):
            pointers, checksums = store.leaf(resolution, index, 0)
            for block in range(volume.block_count):
                if pointer := pointers.item(block):
                    name, offset = ObjectName.of_number(layout.object_of(pointer)), layout.offset_of(pointer)
                    damage = Damage(
                        name.file, offset, volume.block_size, "content", index, block, checksums.item(block), 0, seq
                    )  # fmt: skip
                    found.setdefault(damage.place, damage)
    store.close()
    return found


def content_of(pipeline: Pipeline, block: int, seq: int) -> Damage:
    """Of a block of the first volume, that state `seq` has first."""
    found = contents(pipeline).values()
    (damage,) = (each for each in found if (each.volume, each.block, each.through_seq) == (0, block, seq))
    return damage


def newest_seq(pipeline: Pipeline) -> int:
    store = Store.open(store_of(pipeline))
    latest = store.latest()
    store.close()
    return latest.seq if latest is not None else 0


def path_of(pipeline: Pipeline, damage: Damage) -> Path:
    (path,) = object_files(store_of(pipeline), damage.object)
    return path


def flip(pipeline: Pipeline, damage: Damage) -> None:
    """Every byte of it."""
    with path_of(pipeline, damage).open("r+b") as file:
        file.seek(damage.offset)
        content = file.read(damage.size)
        file.seek(damage.offset)
        file.write(bytes(byte ^ 0xFF for byte in content))


async def until_nothing_is_wanted(pipeline: Pipeline) -> list[Damage]:
    """Waits; what is left is what production has no more."""
    log = DamageLog(store_of(pipeline))
    with trio.fail_after(WAIT_S):
        while any(not each.state for each in log.known()):
            await trio.sleep(0.02)
    return log.known()


async def with_history(both: Linked) -> None:
    for _ in range(3):
        both.write(8)
        both.mark()
        await both.arrived()


@pytest.mark.parametrize("streams", [False, True], ids=["intervals", "streamed"])
async def test_a_store_all_of_whose_contents_are_damaged_is_healed_as_far_as_production_has_them(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """What was overwritten since the first copy was never journalled: that alone is gone."""
    async with linked(pipeline, monkeypatch, streams=streams) as both:
        await both.arrived()
        await with_history(both)
        log, all_contents = DamageLog(store_of(pipeline)), contents(pipeline)
        for damage in all_contents.values():
            flip(pipeline, damage)
        log.replace(list(all_contents.values()))
        gone = {each.place for each in await until_nothing_is_wanted(pipeline)}
        first = {damage.place for damage in all_contents.values() if damage.through_seq == 0}
        assert gone < first and len(all_contents) - len(gone) > len(first) / 2
        for place in gone:  # they come back by other means, so that every state can be compared
            flip(pipeline, all_contents[place])
        both.assert_every_write_is_there()
        both.write(5)  # replication went on
        both.mark()
        await both.arrived()


async def test_a_content_comes_from_the_volume_while_the_block_is_unchanged(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first copy's contents are in no journal."""
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        (damage, *_) = contents(pipeline).values()
        flip(pipeline, damage)
        DamageLog(store_of(pipeline)).note(damage)
        assert await until_nothing_is_wanted(pipeline) == []
        both.assert_every_write_is_there()


async def test_a_content_comes_from_the_journal_when_the_block_was_overwritten(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        for fill in (b"first", b"second"):
            pipeline.write(0, 8192, (fill * 1000)[:4096])
            both.mark()
            await both.arrived()
        damage = content_of(pipeline, 2, 1)
        flip(pipeline, damage)
        DamageLog(store_of(pipeline)).note(damage)
        assert await until_nothing_is_wanted(pipeline) == []
        both.assert_every_write_is_there()


async def test_a_content_that_is_nowhere_is_said_to_be_gone_and_not_asked_for_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        pipeline.write(0, 8192, b"x" * 4096)
        both.mark()
        await both.arrived()
        damage = content_of(pipeline, 2, 0)
        flip(pipeline, damage)
        log = DamageLog(store_of(pipeline))
        log.note(damage)
        (left,) = await until_nothing_is_wanted(pipeline)
        assert left.state == "gone" and left.place == damage.place
        before = os.stat(log.path).st_mtime_ns
        await trio.sleep(0.2)
        assert os.stat(log.path).st_mtime_ns == before


async def test_what_the_log_of_the_open_interval_has_is_healed_before_it_is_closed(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(pipeline, monkeypatch, streams=True) as both:
        await both.arrived()
        pipeline.write(0, 8192, b"x" * 4096)
        with trio.fail_after(WAIT_S):
            while both.shipper.stream.durable_seq < 1 or newest_seq(pipeline) < 1:
                await trio.sleep(0.05)
        damage = content_of(pipeline, 2, 1)
        flip(pipeline, damage)
        DamageLog(store_of(pipeline)).note(damage)
        assert await until_nothing_is_wanted(pipeline) == []
        both.mark()
        await both.arrived()
        both.assert_every_write_is_there()
        DamageLog(store_of(pipeline)).note(damage)  # of what isn't there any more
        assert await until_nothing_is_wanted(pipeline) == []


async def test_files_of_contents_that_are_gone_or_cut_and_headers_are_made_again(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they held is damage like any other then."""
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        await with_history(both)
        lost = [each for each in contents(pipeline).values() if each.through_seq > 0]  # journalled
        gone, cut, *_ = sorted({path_of(pipeline, each) for each in lost})
        whole = {path: path.read_bytes() for path in (gone, cut)}
        gone.unlink()
        with cut.open("r+b") as file:
            file.write(bytes(HEADER_BYTES))
            file.truncate(HEADER_BYTES + 5000)
        log = DamageLog(store_of(pipeline))
        log.replace([Damage(gone.name, 0, 0, "missing"), Damage(cut.name, 0, HEADER_BYTES, "header")])
        assert _make_frames(store_of(pipeline))
        log.replace(lost)
        assert not _make_frames(store_of(pipeline))
        assert await until_nothing_is_wanted(pipeline) == []
        assert {path: path.read_bytes() for path in whole} == whole
        both.assert_every_write_is_there()


async def test_the_link_is_cut_again_and_again_while_it_heals(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy(0)
    async with linked(pipeline, monkeypatch, proxy=proxy) as both:
        await both.arrived()
        damages = list(contents(pipeline).values())
        for damage in damages:
            flip(pipeline, damage)
        DamageLog(store_of(pipeline)).replace(damages)
        with trio.fail_after(WAIT_S):
            for _ in range(5):
                await trio.sleep(0.03)
                proxy.cut()
        assert await until_nothing_is_wanted(pipeline) == []
        both.assert_every_write_is_there()


async def test_an_old_production_is_asked_nothing_and_others_see_that_nothing_comes(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _production_listens(store_of(pipeline))
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        await trio.sleep(0.1)
        assert _production_listens(store_of(pipeline))
    assert not _production_listens(store_of(pipeline))
    monkeypatch.setattr("pitfs.link.sessions.sender.VERSIONS", (1,))
    (damage, *_) = contents(pipeline).values()
    flip(pipeline, damage)
    DamageLog(store_of(pipeline)).note(damage)
    async with linked(pipeline, monkeypatch) as both:
        both.write(3)
        both.mark()
        await both.arrived()
        await trio.sleep(0.1)
        assert not _production_listens(store_of(pipeline))
        assert DamageLog(store_of(pipeline)).known() == [damage]


async def test_a_production_that_gives_other_bytes_heals_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def lies(self: object, wanted: object) -> list[bytes | None]:
        return [b"l" * 4096]

    monkeypatch.setattr("pitfs.replication.heal.ContentFinder.find", lies)
    monkeypatch.setattr(receiver, "RETRY_S", 0.05)
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        (damage, *_) = contents(pipeline).values()
        flip(pipeline, damage)
        before = path_of(pipeline, damage).read_bytes()
        DamageLog(store_of(pipeline)).note(damage)
        with trio.fail_after(WAIT_S):
            while "gave another content" not in caplog.text:
                await trio.sleep(0.02)
        assert path_of(pipeline, damage).read_bytes() == before
        assert DamageLog(store_of(pipeline)).known() == [damage]


def remove_all_between(pipeline: Pipeline) -> list[str]:
    """Removes all snapshots but the first and the last; files of objects that were moved into another one's."""
    path = store_of(pipeline)
    info, catalog = read_store_info(path), Catalog(os.path.join(path, CATALOG), "write")
    history = bytes.fromhex(info.history)
    objects = ObjectPool(os.path.join(path, OBJECTS), info.layout, history, host_of=catalog.host_of)
    store = WritableStore(catalog, objects, node_loader(objects), history, info.volumes)
    ids = [snapshot.id for snapshot in catalog.snapshots()]
    removal = Removal(store, ids[0], ids[-1])
    with changes_locked(path):
        removal.prepare()
        with catalog.changes():
            removal.change()
    removal.free()
    moved = [row[0] for row in catalog.rows("SELECT * FROM moved")]
    objects.close()
    catalog.close()
    return moved


def images(pipeline: Pipeline) -> list[bytes]:
    store = Store.open(store_of(pipeline))
    found = [
        read_image(store, store.at_seq(snapshot.seq), volume)
        for snapshot in store.snapshots() for volume in range(len(SIZES))
    ]  # fmt: skip
    store.close()
    return found


async def test_a_moved_object_is_healed_where_it_is_now_and_nothing_beside_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        for _ in range(3):
            await with_history(both)
        before = contents(pipeline)
        moved = remove_all_between(pipeline)
        left, all_images = contents(pipeline), images(pipeline)
        dead = [each for place, each in before.items() if place not in left and each.object in moved]
        live = [each for each in left.values() if each.object in moved]
        assert len(live) > 3 and len(dead) > 10
        log = DamageLog(store_of(pipeline))
        log.replace(dead)
        assert await until_nothing_is_wanted(pipeline) == []
        assert images(pipeline) == all_images
        catalog = Catalog(os.path.join(store_of(pipeline), CATALOG))
        for each in live:
            name = ObjectName.of_file(each.object)
            assert name is not None
            hosted = catalog.host_of(name)
            assert hosted is not None
            flip(pipeline, msgspec.structs.replace(each, object=hosted[0].file, offset=hosted[1] + each.offset))
        catalog.close()
        log.replace(live)
        assert await until_nothing_is_wanted(pipeline) == []
        assert images(pipeline) == all_images


async def test_check_heals_what_it_can_and_says_what_production_has_no_more(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with linked(pipeline, monkeypatch) as both:
        await both.arrived()
        pipeline.write(0, 8192, b"x" * 4096)
        both.mark()
        await both.arrived()
        found = contents(pipeline)
        for each in found.values():
            flip(pipeline, each)
        command = ["check", store_of(pipeline), "--heal"]
        with trio.fail_after(WAIT_S):
            assert await trio.to_thread.run_sync(main, command) == 1
        printed = capsys.readouterr()
        assert f"1 damaged place; healed before: {len(found) - 1} contents or files" in printed.out
        assert "production has some contents no more" in printed.err
        flip(pipeline, content_of(pipeline, 2, 0))
        assert await trio.to_thread.run_sync(main, command) == 0
        assert "no damaged places" in capsys.readouterr().out
        both.assert_every_write_is_there()
