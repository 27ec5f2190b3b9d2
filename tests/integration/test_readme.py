"""Everything that README.rst and the manual tell people to type is held to: it parses, or it is run, here or by the
demo. What the manual says beside that is held to in tests/unit/test_manual.py."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitfs.cli.main import full_parser
from pitfs.cli.mount import parse_options
from pitfs.config.grants import load_grants
from pitfs.config.production import load_config
from tests.helpers.documents import README, blocks, commands, configurations, fstab_lines, grants
from tests.helpers.hosts import Mount, digest, free_port, xxhsum
from tests.helpers.loops import LoopDevice, force_unmount
from tests.helpers.processes import ROOT, Daemon, HostError, pitfs_command, run, wait_until

SERVICES = ("pitfs-protect@.service", "pitfs-receive.service")
# Programs of others whose long options are looked up in what they print for --help.
OTHERS = frozenset(
    ("apt-get", "cp", "dd", "diff", "e2fsck", "fsfreeze", "getfattr", "install", "ln", "losetup", "ls", "mkdir")
    + ("mkfs.ext4", "mount", "nbdcopy", "nbdinfo", "openssl", "python3", "qemu-img", "systemctl", "truncate", "umount")
)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_is_one_that_exists(words: list[str]) -> None:
    program, arguments = words[0], words[1:]
    if program == "pitfs":
        full_parser().parse_args(arguments)
    elif program.startswith("tools/"):
        assert os.access(ROOT / program, os.X_OK)
        for option in arguments:
            assert option in (ROOT / program).read_text()
    elif program != "/opt/pitfs/bin/pip":
        assert program in OTHERS
        if program != "openssl" and shutil.which(program):  # openssl's are run below
            options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
            text = help_of(program) if options else ""
            assert [option for option in options if option not in text] == []


def help_of(program: str) -> str:
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, timeout=20)
    return done.stdout + done.stderr


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_readme_and_the_manual_make_the_same_certificates() -> None:
    made = [words for words in commands(document="pitfs-tls.7") if words[0] == "openssl"]
    assert made == [words for words in commands("1. Certificates", "README") if words[0] == "openssl"]


def test_the_files_that_are_installed_by_hand_are_there() -> None:
    for words in commands("Install", "README"):
        for word in words:
            if word.startswith("pitfs/"):
                assert (ROOT / word).is_file()
    written = (ROOT / "tools" / "setup").read_text()
    (wanted,) = (words[2:] for words in commands("Install", "README") if words[0] == "apt-get")
    assert [package for package in wanted if not re.search(rf"\b{re.escape(package)}\b", written)] == []


def test_the_configurations_load_as_they_stand(tmp_path: Path) -> None:
    for document, text in configurations().items():
        path = tmp_path / f"{document}.toml"
        path.write_text(text)
        config = load_config(str(path))
        assert (config.group.name, config.replication.host) == ("db1", "replica.example")
    (tmp_path / "grants.toml").write_text(grants())
    assert load_grants(str(tmp_path / "grants.toml")) == {"db1": frozenset({"production.example"})}
    (settings,) = (block.text for block in blocks() if block.language == "ini")
    unit = (ROOT / "pitfs" / "data" / "pitfs-receive.service").read_text()
    for line in settings.splitlines():
        assert line in unit, "the manual says that these are the defaults"


def test_the_fstab_lines_are_right(tmp_path: Path) -> None:
    lines = fstab_lines()
    assert len(lines) == 5
    table = tmp_path / "fstab"
    table.write_text("\n".join(lines) + "\n")
    verified = run(["findmnt", "--verify", "--tab-file", table], accept=(0, 1))
    assert "0 parse errors" in verified.stdout + verified.stderr
    for source, _, kind, options, *_ in map(str.split, lines):
        assert "_netdev" in options.split(",")
        if kind == "pitfs":
            parse_options(options, store=source, mountpoint="/mnt")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_units_are_right(tmp_path: Path) -> None:
    for name in SERVICES:
        text = (ROOT / "pitfs" / "data" / name).read_text()
        path = tmp_path / name.replace("@", "@db1")
        path.write_text(text.replace("/usr/local/bin/pitfs", "/bin/true"))  # it may not be installed here
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
        )
        assert [line for line in done.stderr.splitlines() if name.partition("@")[0] in line] == []


# ------------------------------------------------------------------ the two hosts, for real


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's openssl commands make; its replica host is this machine."""
    directory = tmp_path_factory.mktemp("certificates")
    made = [words for words in commands("1. Certificates", "README") if words[0] == "openssl"]
    assert len(made) == 5
    for words in made:
        words = [word.replace("replica.example", "localhost") for word in words]
        subprocess.run(words, cwd=directory, check=True, capture_output=True)
    assert {path.stat().st_mode & 0o077 for path in directory.glob("*.key")} == {0}
    return directory


class Hosts:
    """`pitfs receive` and `pitfs protect` of the README, with TLS, moved to loopback and under `tmp`."""

    def __init__(self, tmp: Path, certificates: Path, group: str = "db1") -> None:
        self.tmp, self.group = tmp, group
        port = free_port()
        places = {
            "/srv/root.img": tmp / "root.img",
            "/var/lib/pitfs/db1": tmp / "state",
            "/run/pitfs/db1": tmp / "volumes",
            "/etc/pitfs/receive/certificate.pem": certificates / "replica.pem",
            "/etc/pitfs/receive/key.pem": certificates / "replica.key",
            "/etc/pitfs/receive/authority.pem": certificates / "ca.pem",
            "/etc/pitfs/": f"{certificates}/",
            "/srv/pitfs/db1": tmp / "stores" / "db1",
            "/srv/pitfs": tmp / "stores",
            "/srv/db1": tmp / "live",
            "/mnt/db1": tmp / "mount",
            "/mnt/try": tmp / "try",
            "/mnt/frozen": tmp / "frozen",
            "/var/tmp/scratch": tmp / "scratch",
            "/mnt/latest": tmp / "latest",
            "replica.example:7420": f"localhost:{port}",
            "[::]:7420": f"localhost:{port}",
            '"db1"': f'"{group}"',
            "10GiB": "256MiB",
        }
        self._places = {name: str(place) for name, place in places.items()}
        with (tmp / "root.img").open("wb") as file:
            file.truncate(64 << 20)
        self.config = tmp / "db1.toml"
        self.config.write_text(self.moved(configurations()["README"]))
        (words,) = (words for words in commands("FILES", "pitfs.7") if words[:2] == ["pitfs", "receive"])
        receive = [self.moved(word) for word in words[1:]]
        self.receive = Daemon([*pitfs_command(), *receive], tmp / "receive.log", "receive")
        self.protect = Daemon([*pitfs_command(), "protect", str(self.config)], tmp / "protect.log", "protect")

    def moved(self, text: str) -> str:
        """The README's text with its hosts and paths replaced by those of this test; longest names first."""
        return re.sub("|".join(map(re.escape, self._places)), lambda match: self._places[match[0]], text)

    def pitfs(self, *arguments: str | Path) -> str:
        return run([*pitfs_command(), *arguments]).stdout.strip()

    def __enter__(self) -> Hosts:
        self.receive.start()
        self.protect.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.protect.clean_up()
        force_unmount(self.tmp / "volumes")
        self.receive.clean_up()


@pytest.fixture
def hosts(tmp_path: Path, certificates: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path, certificates) as running:
        yield running


@pytest.mark.fuse
@pytest.mark.loop
def test_two_hosts_with_these_certificates_and_fstab_lines_work(hosts: Hosts) -> None:
    tmp, store, volume = hosts.tmp, hosts.tmp / "stores" / "db1", hosts.tmp / "volumes" / "root"
    table = tmp / "fstab"
    table.write_text(hosts.moved("\n".join(fstab_lines()) + "\n"))
    live, latest, frozen = (tmp / name for name in ("live", "latest", "frozen"))
    for place in (live, latest, frozen, tmp / "scratch"):
        place.mkdir()
    with LoopDevice(volume) as device:
        run(["mkfs.ext4", "-q", device])
    try:
        run(["mount", "-T", table, live])
        (live / "ledger").write_text("monday,100\n")
        run(["fsfreeze", "--freeze", live])
        try:
            instant = hosts.pitfs("snapshot", hosts.config)
            assert digest(store, instant) == xxhsum(volume)
        finally:
            run(["fsfreeze", "--unfreeze", live])
        with Mount(store, tmp):
            run(["mount", "-T", table, frozen])
            assert (frozen / "ledger").read_text() == "monday,100\n"
            run(["umount", frozen])
        write_to_an_image(hosts, table)
        run(["umount", live])
        wait_until(lambda: not run(["losetup", "-j", volume]).stdout, "umount detaches the loop device", 10)
    finally:
        for place in (frozen, latest, live):
            force_unmount(place)
    hosts.protect.terminate()
    hosts.receive.terminate()


def write_to_an_image(hosts: Hosts, table: Path) -> None:
    """The mount with scratch=, what an image is checked with, and the line that mounts the filesystem in it."""
    latest = hosts.tmp / "latest"
    (words,) = (words for words in commands("WRITABLE IMAGES", "mount.pitfs.8") if words[0] == "mount")
    options = hosts.moved(words[words.index("-o") + 1])
    assert any(f"/mnt/try pitfs nofail,_netdev,{words[words.index('-o') + 1]} " in " ".join(line.split())
               for line in fstab_lines())  # fmt: skip
    (check,) = (words for words in commands("LOOK INTO IT", "pitfs-recovery.7") if words[0] == "e2fsck")
    with Mount(hosts.tmp / "stores" / "db1", hosts.tmp, name="try", options=options) as mount:
        with LoopDevice(mount.image("latest")) as device:
            run([*check[:-1], device], accept=(0, 1))
        run(["mount", "-T", table, latest])
        try:
            with (latest / "ledger").open("a") as ledger:
                ledger.write("tuesday,200\n")
        finally:
            run(["umount", latest])
        with LoopDevice(mount.image("latest")) as device:
            run(["e2fsck", "-f", "-n", device])


@pytest.mark.fuse
@pytest.mark.loop
def test_a_filesystem_comes_back_after_the_splitter_died(hosts: Hosts) -> None:
    """The section of that name, line by line."""
    volume, live = hosts.tmp / "volumes" / "root", hosts.tmp / "live"
    live.mkdir()
    devices = [run(["losetup", "--direct-io=on", "--find", "--show", volume]).stdout.strip()]
    try:
        run(["mkfs.ext4", "-q", devices[0]])
        run(["mount", devices[0], live])
        with (live / "ledger").open("w") as ledger:
            ledger.write("monday,100\n")
            ledger.flush()
            os.fsync(ledger.fileno())
        (splitter,) = hosts.protect.pids("pitfs-splitter")
        os.kill(splitter, signal.SIGKILL)
        wait_until(lambda: hosts.protect.pids("pitfs-splitter") not in ([], [splitter]) and os.path.exists(volume),
                   "the splitter starts again", 20)  # fmt: skip
        words = commands("When the splitter died", "README")
        assert [each[0] for each in words] == ["umount", "losetup", "losetup", "mount"]
        for line in words:
            said = run([devices[-1] if word == "/dev/loop0" else hosts.moved(word) for word in line]).stdout
            if "--show" in line:
                devices.append(said.strip())
        assert (live / "ledger").read_text() == "monday,100\n"
    finally:
        force_unmount(live)
        for device in devices:
            run(["losetup", "--detach", device], accept=(0, 1))


@pytest.mark.fuse
def test_a_certificate_for_another_group_sends_nothing(tmp_path: Path, certificates: Path) -> None:
    with Hosts(tmp_path, certificates, group="db2") as hosts:
        wait_until(lambda: "db2" in hosts.receive.logged(), "the receiver refuses", 20)
        with pytest.raises(HostError, match="db2"):
            hosts.pitfs("snapshot", hosts.config)
        assert not (tmp_path / "stores" / "db2").exists()


@pytest.mark.fuse
@pytest.mark.loop
def test_a_volume_goes_back_through_the_splitter(hosts: Hosts) -> None:
    """The recipe with dd, and that it is an interval like any other."""
    store, volume, image = hosts.tmp / "stores" / "db1", hosts.tmp / "volumes" / "root", hosts.tmp / "root.copy"
    written = []
    for byte in (b"1", b"2"):
        with volume.open("r+b") as file:
            file.write(byte * (1 << 20))
            file.flush()
            os.fsync(file.fileno())
        written.append((hosts.pitfs("snapshot", hosts.config), xxhsum(volume)))
    (good, wanted), (bad, found) = written
    assert wanted != found
    (export,) = (words for words in commands("The night", "README") if words[:2] == ["pitfs", "export"])  # fmt: skip
    hosts.pitfs(*(str({"/srv/pitfs/db1": store, "/var/tmp/root.img": image}.get(word, word))
                  if not word.startswith("2026-") else good for word in export[1:]))  # fmt: skip
    (dd,) = (words for words in commands("The night", "README") if words[0] == "dd")
    run(shlex.split(hosts.moved(shlex.join(dd)).replace("/var/tmp/root.img", str(image))))
    assert xxhsum(volume) == wanted
    again = hosts.pitfs("snapshot", hosts.config)
    assert [digest(store, instant) for instant in (good, bad, again)] == [wanted, found, wanted]
