"""The bytes of a store's objects stay what they are; what isn't a store is said to be none."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreError, StoreVersionError
from pitfs.model.blockmap import EMPTY, MapBuilder, MapEntry, decode_node, new_node
from pitfs.model.group import identity_problem
from pitfs.model.transfer import POSITION, VolumeInfo
from pitfs.store.catalog.database import Database
from pitfs.store.index.format import INDEX_ROW, IndexWriter
from pitfs.store.objects.format import (
    HEADER_BYTES,
    VERSION_1,
    Layout,
    ObjectHeader,
    ObjectKind,
    ObjectName,
)
from pitfs.store.opening import read_store_info
from pitfs.store.store import Store

GOLDEN = Path(__file__).parents[1] / "golden"
HEADER = ObjectHeader(ObjectKind.JOURNAL_INDEX, bytes(range(16)), 0x1234, 81920, 160, 0xFEDCBA9876543210)


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / name).read_text("ascii"))


def test_the_header_of_an_object_has_the_golden_bytes() -> None:
    data = HEADER.encode()
    assert len(data) == HEADER_BYTES
    assert data[:72] == golden("store-object-header.hex")
    assert not any(data[72:])
    assert ObjectHeader.decode(data, "object") == HEADER


def test_a_map_has_the_golden_bytes() -> None:
    emitted: list[bytes] = []

    def emit(node: np.ndarray) -> int:
        emitted.append(node.tobytes())
        return VERSION_1.node_pointer(3, len(emitted) - 1)

    builder = MapBuilder(1000, EMPTY, lambda *_: new_node(), emit)
    builder.update(
        np.array([1, 513], "<i8"), np.array([6 << 36 | 8, 7 << 36], "<u8"), np.array([17, 18], "<u8")
    )
    root = builder.finish()
    assert b"".join(data.rstrip(b"\0") for data in emitted) == golden("store-map-nodes.hex")
    assert root == MapEntry(3 << 36 | 2, xxh3_64_intdigest(emitted[-1]))
    assert decode_node(emitted[0])[1, 1] == 17


def test_a_journal_index_has_the_golden_bytes(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "index", os.O_RDWR | os.O_CREAT)
    writer = IndexWriter(fd)
    last = 4, 12, 1 << 37, 99
    writer.add_rows(np.array([(0, 4, 11, 0, 0), (0, *last), (1, *last)], INDEX_ROW))
    writer.add_positions(np.array([(11, 1000), (12, 2000)], POSITION))
    data_bytes, tail_bytes, checksum = writer.finish()
    os.close(fd)
    data = (tmp_path / "index").read_bytes()
    assert not any(data[:HEADER_BYTES])
    assert data[HEADER_BYTES:] == golden("store-journal-index.hex")
    assert (data_bytes, tail_bytes) == (2 * 32 + 32 + 32, 3 * 40)
    assert checksum == xxh3_64_intdigest(data[HEADER_BYTES + data_bytes :])


@pytest.mark.parametrize("offset", range(72))
def test_a_header_with_any_damaged_byte_is_refused(offset: int) -> None:
    data = bytearray(HEADER.encode())
    data[offset] ^= 0x10
    with pytest.raises(CorruptionError, match="object: damaged"):
        ObjectHeader.decode(bytes(data), "object")


def test_a_header_of_a_newer_version_or_another_form_says_so() -> None:
    for offset in (8, 14):
        data = bytearray(HEADER.encode())
        data[offset] += 1
        data[64:72] = xxh3_64_intdigest(bytes(data[:64])).to_bytes(8, "little")
        with pytest.raises(StoreVersionError, match="newer"):
            ObjectHeader.decode(bytes(data), "object")


SIZES = (VolumeInfo("a", 3 << 40, 16384), VolumeInfo("b", 1 << 40, 4096))  # 4 TiB
LAYOUTS = (VERSION_1, Layout.of(SIZES), Layout.of((VolumeInfo("a", 1, 512),)), Layout.of((VolumeInfo("a", 1, 65536),)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pointers_lead_to_objects_and_back(layout: Layout) -> None:
    last_unit = layout.max_units - 1
    for kind in (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS):
        for snapshot_id in (1, 77, layout.max_snapshot_id):
            name = ObjectName(kind, snapshot_id)
            value = layout.pointer(name, last_unit)
            assert value < 1 << 64
            assert (layout.object_of(value), layout.unit_of(value)) == (name.number, last_unit)
            assert ObjectName.of_number(name.number) == name
            assert layout.offset_of(value) == 4096 + last_unit * layout.unit_bytes
    assert layout.pointer(ObjectName(ObjectKind.JOURNAL_BLOCKS, layout.max_snapshot_id), last_unit) == (1 << 64) - 1
    assert layout.offset_of(layout.pointer(ObjectName(ObjectKind.SNAPSHOT_BLOCKS, 1))) == 4096
    node = layout.node_pointer(77, 5)
    assert (layout.object_of(node), layout.unit_of(node)) == (77, 5)


SECONDS_OF_100_YEARS = 100 * 365.25 * 86400


@pytest.mark.parametrize(
    ("volumes", "unit_bytes", "unit_bits"),
    [
        ((VolumeInfo("a", 1, 512),), 512, 30),
        ((VolumeInfo("a", 4 << 40, 4096),), 4096, 30),
        (SIZES, 4096, 30),
        ((*SIZES, VolumeInfo("c", 1, 4096)), 4096, 31),
        ((VolumeInfo("a", 32 << 40, 65536),), 65536, 30),
        ((VolumeInfo("a", 32 << 40, 4096), VolumeInfo("b", 1, 512)), 512, 37),
    ],
)
def test_pointers_have_as_many_bits_for_units_as_a_copy_of_all_volumes_takes(
    volumes: tuple[VolumeInfo, ...], unit_bytes: int, unit_bits: int
) -> None:
    layout = Layout.of(volumes)
    assert layout == Layout(unit_bytes, unit_bits)
    assert sum(v.block_count * v.block_size for v in volumes) <= layout.max_units * unit_bytes
    assert all(v.block_size % unit_bytes == 0 for v in volumes)
    # An interval takes two ids where it is streamed: one for its log.
    assert unit_bits > 30 or layout.max_snapshot_id / 2 > SECONDS_OF_100_YEARS


def test_folders_of_objects_have_some_thousand_names_however_many_objects_there_are() -> None:
    layout = Layout(4096, 30)
    folders, top = dict[str, int](), set[str]()
    for snapshot_id in [*range(1, 700), *range(1 << 12, 1 << 33, 0xFFFEF)]:
        for kind in ObjectKind:
            folder, _, file = layout.path_of(ObjectName(kind, snapshot_id).file).rpartition("/")
            assert ObjectName.of_file(file) == ObjectName(kind, snapshot_id)
            folders[folder] = folders.get(folder, 0) + 1
            top.add(folder.split("/")[0])
    assert max(folders.values()) == 1024
    assert len(top) == 8192
    assert all(re.fullmatch("[0-9a-f]{4}/[0-9a-f]{3}", folder) for folder in folders)
    assert layout.path_of(ObjectName(ObjectKind.MAP, 0x12345).file) == "0000/123/snapshot-0000000000012345.map"
    assert VERSION_1.path_of(ObjectName(ObjectKind.MAP, 0x12345).file) == "snapshot-0000000000012345.map"


def test_object_files_are_told_from_others() -> None:
    assert ObjectName(ObjectKind.MAP, 10).file == "snapshot-000000000000000a.map"
    names = [*(ObjectName(kind, 5) for kind in ObjectKind), ObjectName(ObjectKind.JOURNAL_INDEX, 5, 0)]
    assert [ObjectName.of_file(name.file) for name in names] == names
    for name in (
        "snapshot-5.map",
        "journal-0000000000000005.map",
        "lost+found",
        "snapshot-0000000000000005.map.tmp",
    ):
        assert ObjectName.of_file(name) is None


@pytest.mark.parametrize(
    ("group", "volumes", "problem"),
    [
        ("..", (VolumeInfo("a", 1, 512),), "group name"),
        ("a/b", (VolumeInfo("a", 1, 512),), "group name"),
        ("g" * 65, (VolumeInfo("a", 1, 512),), "group name"),
        ("g", (), "0 volumes"),
        ("g", (VolumeInfo("../x", 1, 512),), "volume name"),
        ("g", (VolumeInfo("a", 1, 512), VolumeInfo("a", 2, 512)), "same name"),
        ("g", (VolumeInfo("a", 1, 500),), "block size"),
        ("g", (VolumeInfo("a", 1, 131072),), "block size"),
        ("g", (VolumeInfo("a", 0, 512),), "size of 0"),
        ("g", (VolumeInfo("a", 1 << 63, 512),), "32 TiB"),
    ],
)
def test_a_group_that_cannot_be_is_refused(group: str, volumes: tuple[VolumeInfo, ...], problem: str) -> None:
    assert problem in (identity_problem(group, "0" * 32, volumes) or "")
    assert identity_problem("g", "0" * 32, (VolumeInfo("a", 1, 512),)) is None
    assert "history" in (identity_problem("g", "xyz", (VolumeInfo("a", 1, 512),)) or "")


def test_what_is_not_a_store_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such directory"):
        Store.open(str(tmp_path / "missing"))
    with pytest.raises(StoreError, match=r"it has no store\.json: a store is a directory ROOT/GROUP"):
        Store.open(str(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="not a directory"):
        Store.open(str(tmp_path / "file"))
    store = tmp_path / "root" / "db1"
    store.mkdir(parents=True)
    (store / "store.json").write_text('{"format": "pitfs-store", "version": 1, "group": "db1"}')
    with pytest.raises(StoreError, match="damaged"):
        read_store_info(str(store))
    with pytest.raises(StoreError, match="there are stores in it: db1"):
        read_store_info(str(tmp_path / "root"))
    (store / "store.json").write_text('{"format": "pitfs-store", "version": 3, "anything": []}')
    with pytest.raises(StoreVersionError, match="newer pitfs"):
        read_store_info(str(store))
    for text in ("[]", "nonsense", '{"format": 1}', ""):
        (store / "store.json").write_text(text)
        with pytest.raises(StoreError, match=r"store\.json"):
            read_store_info(str(store))


def test_a_path_that_sqlite_does_not_take_is_said_to_be_the_reason(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="isn't UTF-8: rename"):
        Database(str(tmp_path / "catalog\udcff"), "make")
