"""`pitfs protect`, `snapshot`, `bookmark` and `status` with a wrong configuration, backing, state or mountpoint."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
from pathlib import Path

import pytest

from pitfs.cli.main import main
from tests.helpers.hosts import Production, Replica, digest, free_port, xxhsum
from tests.helpers.loops import LoopDevice, MountedFilesystem, force_unmount, free_file, is_mounted
from tests.helpers.processes import HostError, run, wait_until
from tests.helpers.refusals import config_text, pitfs_refused, together, write_config

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
MIB = 1 << 20
PR_GET_IO_FLUSHER = 58


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    return free_file(tmp_path / "backing", MIB)


# -- the configuration


@pytest.mark.parametrize("command", ["protect", "snapshot", "status"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[splitter]", "[spliter]"), ("line 6, spliter", "did you mean 'splitter'?")),
        (('interval = "2s"', 'interval = "2"'), ("line 10, replication.interval", '"60s"')),
        (('interval = "2s"', 'on_disconnect = "block"'), ("line 10, replication.on_disconnect", "set mode = \"sync\"")),
        (('interval = "2s"', 'window = "256MiB"'), ("line 10, replication.window", "128MiB")),
        (("[volumes.root]", '[volumes."ro/ot"]'), ("volumes", "'ro/ot'", "A-Z a-z 0-9 . _ -")),
        (('name = "g"', 'name = "a b"'), ("line 2, group.name", "isn't a valid name")),
        (("[group]", "[group"), ("line 1", "isn't valid TOML")),
        (("insecure = true", ""), ("tls", "certificate, key and authority")),
        (("127.0.0.1:1", "192.0.2.1:1"), ("tls.insecure", "loopback")),
        (("127.0.0.1:1", "here"), ("replication.replica", "HOST:PORT")),
    ],
)
def test_a_wrong_configuration_is_one_line_with_file_line_and_key(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: tuple[str, str],
    words: tuple[str, ...],
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(config_text(tmp_path, {"root": tmp_path / "backing"}).replace(*change))
    assert main([command, str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    for word in (f"pitfs: {path}: ", *words):
        assert word in said.err
    assert not (tmp_path / "state").exists()


def test_a_configuration_that_is_none_is_named(tmp_path: Path) -> None:
    together(
        lambda: pitfs_refused(
            2, f"{tmp_path}/no.toml", "No such file", args=["protect", tmp_path / "no.toml"]
        ),
        lambda: pitfs_refused(
            2, f"{tmp_path}/no.toml", "No such file", args=["snapshot", tmp_path / "no.toml"]
        ),
        lambda: pitfs_refused(
            2, f"{tmp_path}/no.toml", "no such file", args=["status", tmp_path / "no.toml"]
        ),
        lambda: pitfs_refused(2, f"{tmp_path}: ", "Is a directory", args=["protect", tmp_path]),
    )


# -- nothing is running


@pytest.mark.parametrize("command", [["snapshot"], ["status"], ["bookmark"]])
def test_asking_a_group_that_is_not_running_says_to_start_it(
    tmp_path: Path, backing: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    config = write_config(tmp_path, {"root": backing})
    more = ["b"] if command == ["bookmark"] else []
    assert main([*command, str(config), *more]) == 2
    assert "no such state directory" in (said := capsys.readouterr().err) and said.count("\n") == 1
    (tmp_path / "state").mkdir()
    assert main([*command, str(config), *more]) == 1
    said = capsys.readouterr().err
    assert f"'pitfs protect {config}' isn't running: start it" in said and said.count("\n") == 1


# -- the backing volume


def test_a_backing_that_can_not_be_one_is_refused(tmp_path: Path) -> None:
    free_file(tmp_path / "empty", 0)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()

    def refuse(name: str, *words: str) -> None:
        config = write_config(
            tmp_path, {"root": tmp_path / name}, f"{name}.toml", state=tmp_path / f"{name}.state",
            mountpoint=tmp_path / f"{name}.volumes",
        )  # fmt: skip
        pitfs_refused(2, f"{tmp_path}/{name}: backing volume: ", *words, args=["protect", config])
        assert not is_mounted(tmp_path / f"{name}.volumes")

    together(
        lambda: refuse("missing", "No such file", "truncate -s"),
        lambda: refuse("directory", "neither a regular file nor a block device"),
        lambda: refuse("empty", "is empty", "truncate"),
        lambda: refuse("fifo", "neither a regular file nor a block device"),
    )


@pytest.mark.loop
def test_a_backing_in_use_by_a_loop_device_or_mounted_is_refused(tmp_path: Path) -> None:
    backing = free_file(tmp_path / "backing", 8 * MIB)
    with LoopDevice(backing) as device:
        config = write_config(tmp_path, {"root": backing})
        pitfs_refused(2, f"{backing}: backing volume: in use", "losetup -j", args=["protect", config])
        run(["mkfs.ext4", "-q", device])
        config = write_config(tmp_path, {"root": device})
        with MountedFilesystem(device, tmp_path / "live", "ext4"):
            pitfs_refused(2, f"{device}: backing volume: in use", "unmount it", args=["protect", config])
            (tmp_path / "live" / "file").write_text("unharmed")
            assert (tmp_path / "live" / "file").read_text() == "unharmed"


def test_what_another_protect_holds_is_refused_and_it_goes_on(tmp_path: Path) -> None:
    with Production(tmp_path, {"root": MIB}, port=1) as production:
        pitfs_refused(2, f"{production.state}: another 'pitfs protect' is running", "stop it",
                      args=["protect", production.config])  # fmt: skip
        backing = production.backings["root"]
        config = write_config(tmp_path, {"root": backing})
        pitfs_refused(2, f"{backing}: backing volume: in use", args=["protect", config])
        config = write_config(
            tmp_path, {"root": free_file(tmp_path / "b2", MIB)}, state=tmp_path / "s2",
            mountpoint=production.mountpoint,
        )  # fmt: skip
        pitfs_refused(2, f"{production.mountpoint}: mountpoint: busy", f"umount {production.mountpoint}",
                      args=["protect", config])  # fmt: skip
        config.unlink()
        production.volume().write_bytes(b"x" * MIB)
        production.terminate()
        assert backing.read_bytes() == b"x" * MIB


def test_a_state_made_for_other_volumes_is_refused_and_goes_on_with_the_right_ones(tmp_path: Path) -> None:
    with Production(tmp_path, {"root": MIB}, port=1) as production:
        production.volume().write_bytes(b"y" * MIB)
        production.terminate()
    state, backing = production.state, production.backings["root"]
    other = free_file(tmp_path / "other", MIB)

    def refuse(
        words: tuple[str, ...], volumes: dict[str, Path], name: str = "c.toml", **options: object
    ) -> None:
        config = write_config(tmp_path, volumes, name, state=state, **options)
        pitfs_refused(2, *words, args=["protect", config])

    refuse((f"{state}: is the state of group 'g', not 'h'", "its own `state`"), {"root": backing}, group="h")
    refuse((f"{state}: was made for volumes root", "new group"), {"data": other, "root": backing})
    os.truncate(backing, 2 * MIB)
    refuse(("'root'", f"changed in size from {MIB} to {2 * MIB}", "give it its size back"), {"root": backing})
    os.truncate(backing, MIB)
    with production:
        assert production.volume().read_bytes() == b"y" * MIB


def test_a_state_that_can_not_be_made_is_refused(tmp_path: Path, backing: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, {"root": backing}, state=tmp_path / "file")
    pitfs_refused(2, f"{tmp_path}/file", "state directory", "Not a directory", args=["protect", config])


def test_a_damaged_state_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    with Production(tmp_path, {"root": MIB}, port=1) as production:
        production.terminate()

    def refuse(copy: str, name: str, damage: bytes | None, code: int, *words: str) -> None:
        state, backing = tmp_path / copy, tmp_path / f"{copy}.backing"
        shutil.copytree(production.state, state, ignore=shutil.ignore_patterns("*.sock"))
        shutil.copy2(production.backings["root"], backing)
        if damage is None:
            shutil.rmtree(state / name)
        else:
            (state / name).write_bytes(damage)
        config = write_config(
            tmp_path, {"root": backing}, f"{copy}.toml", state=state, mountpoint=tmp_path / f"{copy}.volumes"
        )
        pitfs_refused(code, f"{state}/{name}: ", *words, args=["protect", config])
        assert damage is None or (state / name).read_bytes() == damage

    newer = b'{"format": 9, "history": "00", "group": "g", "volumes": []}'
    together(
        lambda: refuse("a", "group.json", b"{", 1, "damaged at byte 0"),
        lambda: refuse("b", "group.json", newer, 2, "format 9, this pitfs knows 1", "newer pitfs"),
        lambda: refuse("c", "progress", b"\1" * 8192, 1, "damaged at byte 0"),
        lambda: refuse("d", "journal", None, 2, "the journal ends before its checkpoint", "put them back"),
    )


def test_a_kernel_that_refuses_what_little_memory_needs_is_said_by_default(tmp_path: Path) -> None:
    with Production(tmp_path, {"root": MIB}, port=free_port()) as production:
        lines = [line for line in production.logged().splitlines() if "PR_SET_IO_FLUSHER" in line]
        refused = ctypes.CDLL(None).prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) < 0
        assert len(lines) == refused


# -- the mountpoint


def test_a_mountpoint_that_can_not_be_one_is_refused(tmp_path: Path, backing: Path) -> None:
    (tmp_path / "file").touch()
    for path, words in (
        (tmp_path / "file", "not a directory"),
        (tmp_path / "file" / "below", "Not a directory"),
    ):
        config = write_config(tmp_path, {"root": backing}, mountpoint=path)
        pitfs_refused(2, f"{path}: mountpoint: ", words, args=["protect", config])
        assert not (tmp_path / "state" / "group.json").exists()


def test_a_mountpoint_that_is_not_empty_is_refused(tmp_path: Path, backing: Path) -> None:
    """The mount would hide what is there: the configuration, for one, which the shipper reads after the splitter."""
    place = tmp_path / "full"
    place.mkdir()
    config = write_config(tmp_path, {"root": backing}, mountpoint=place).rename(place / "c.toml")
    pitfs_refused(2, f"{place}: mountpoint: not empty", "c.toml", "give an empty directory", args=["protect", config])
    assert os.listdir(place) == ["c.toml"] and not is_mounted(place)


def test_a_mountpoint_where_something_is_mounted_is_refused(tmp_path: Path, backing: Path) -> None:
    (tmp_path / "volumes").mkdir()
    run(["mount", "-t", "tmpfs", "somebody", tmp_path / "volumes"])
    try:
        config = write_config(tmp_path, {"root": backing})
        pitfs_refused(2, f"{tmp_path}/volumes: mountpoint: busy: somebody is mounted there", "umount",
                      args=["protect", config])  # fmt: skip
    finally:
        force_unmount(tmp_path / "volumes")


def test_our_own_dead_mount_is_cleared_and_somebody_elses_is_not(tmp_path: Path) -> None:
    with Production(tmp_path, {"root": MIB}, port=1) as production:
        production.volume().write_bytes(b"z" * MIB)
        os.stat(production.mountpoint)  # its attributes outlive it in the kernel's cache
        production.kill()
        with pytest.raises(OSError, match=r"not connected|connection abort"):
            os.listdir(production.mountpoint)
        config = write_config(
            tmp_path, {"root": free_file(tmp_path / "b2", MIB)}, state=tmp_path / "s2", group="h",
            mountpoint=production.mountpoint,
        )  # fmt: skip
        pitfs_refused(2, f"{production.mountpoint}: mountpoint: ", "dead", "pitfs-splitter:g",
                      f"umount -l {production.mountpoint}", args=["protect", config])  # fmt: skip
        assert is_mounted(production.mountpoint)
        production.restart()
        assert production.volume().read_bytes() == b"z" * MIB
        production.terminate()
        assert not is_mounted(production.mountpoint)


def test_a_bookmark_is_never_moved_nor_misnamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Production(tmp_path, {"root": MIB}, port=1) as production:
        production.wait_for_shipper()
        production.bookmark("one")
        for name, words in (
            ("one", "exists already"),
            ("a/b", "a/b"),
            ("", "bookmark"),
            ("x" * 300, "bookmark"),
        ):
            assert main(["bookmark", str(production.config), name]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and words in said
        production.terminate()


# -- a configuration that is edited while it runs


def test_a_configuration_that_was_edited_meanwhile_ships_nothing_until_it_fits_again(tmp_path: Path) -> None:
    """The shipper reads it anew when it starts again after a crash; the splitter has that of its start."""
    other = free_file(tmp_path / "other", MIB)
    with Replica(tmp_path) as replica, Production(tmp_path, {"root": MIB}, port=replica.port) as production:
        production.volume().write_bytes(b"z" * MIB)
        production.snapshot()
        text = production.config.read_text()
        production.config.write_text(text.replace(str(production.backings["root"]), str(other)))

        def link_says(words: str) -> bool:
            with contextlib.suppress(HostError):  # there is no shipper for a moment
                return words in str(production.status()["link"])
            return False

        for configured, words in ((True, "the configuration was changed"), (False, "connected")):
            if not configured:
                production.config.write_text(text)
            for pid in production.pids("pitfs-shipper"):
                os.kill(pid, signal.SIGKILL)
            wait_until(functools.partial(link_says, words), words, 60, 0.2)
        assert str(other) in production.logged() and "restart 'pitfs protect'" in production.logged()
        assert digest(replica.store(), production.snapshot()) == xxhsum(production.volume())
