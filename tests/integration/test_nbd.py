"""`pitfs serve-nbd` with the clients that people have: libnbd's and qemu's; TLS; and wrong use."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme
from xxhash import xxh3_128_hexdigest

from pitfs.cli import serve_nbd
from pitfs.cli.main import main
from pitfs.model.transfer import VolumeInfo
from pitfs.nbd.exports import MAX_LISTED_SNAPSHOTS
from pitfs.nbd.server import MAX_CONNECTIONS
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from pitfs.view.view import PointInTimeView
from tests.helpers.documents import commands, page
from tests.helpers.hosts import digest, free_port, instant_name, xxhsum
from tests.helpers.links import Files, issue
from tests.helpers.processes import Daemon, HostError, pitfs_command, run, wait_until
from tests.helpers.refusals import pitfs_refused, together
from tests.helpers.stores import ingest_transfer, object_files
from tests.helpers.transfers import History

MIB = 1 << 20
ROOT, DATA = VolumeInfo("root", 3 * MIB, 4096), VolumeInfo("data", 12_345, 512)
CLIENT_FILES = ("client-cert.pem", "client-key.pem", "ca-cert.pem")  # as libnbd and qemu look for them
SEQ = 9  # of the instant that most is asked of, between two snapshots


class Server(Daemon):
    """`pitfs serve-nbd` of a store."""

    def __init__(self, store: Path, tmp: Path, *options: str) -> None:
        super().__init__([*pitfs_command(), "serve-nbd", str(store), *options], tmp / "nbd.log", "serve-nbd")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[History, Path]:
    history = History(9, (ROOT, DATA))
    ingest = Ingest(str(tmp_path_factory.mktemp("stores")), history.hello)
    ingest_transfer(ingest, history.close_interval(None, ["start"]))
    for _ in range(16):
        history.write()
    ingest_transfer(ingest, history.close_interval(0, ["before-upgrade"]))
    ingest.close()
    return history, Path(ingest.path)


@pytest.fixture
def history(made: tuple[History, Path]) -> History:
    return made[0]


@pytest.fixture
def store(made: tuple[History, Path]) -> Path:
    return made[1]


@pytest.fixture(scope="module")
def server(made: tuple[History, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of one that runs for all of these tests."""
    tmp = tmp_path_factory.mktemp("server")
    with Server(made[1], tmp, "--unix", str(tmp / "s")) as running:
        yield tmp / "s"
        running.terminate()
        assert not (tmp / "s").exists()
        assert "Traceback" not in running.logged() and "bug in pitfs" not in running.logged()


def uri(server: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={server}"


@pytest.fixture
def instant(history: History) -> str:
    return instant_name(history.times_ns[SEQ])


# ------------------------------------------------------------------ the clients


def test_copies_have_the_digest_of_the_image(
    server: Path, store: Path, instant: str, history: History, tmp_path: Path
) -> None:
    export, wanted = uri(server, f"{instant}/root"), digest(store, instant)
    assert wanted == xxh3_128_hexdigest(history.states[SEQ][0])
    copied, converted, sparse = tmp_path / "nbdcopy", tmp_path / "qemu", tmp_path / "sparse"
    run(["nbdcopy", export, copied])
    run(["qemu-img", "convert", "-f", "raw", "-O", "raw", export, converted])
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", export, sparse])
    run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", copied, sparse])
    assert [xxhsum(copied), xxhsum(converted)] == [wanted, wanted]
    assert converted.stat().st_blocks * 512 < ROOT.size_bytes  # zeros weren't copied
    run(["nbdcopy", "--synchronous", uri(server, f"{instant}/data"), copied])  # no multiple of a sector
    assert copied.read_bytes()[: DATA.size_bytes] == history.states[SEQ][1]


def test_nbdinfo_shows_what_there_is(server: Path, store: Path, history: History, instant: str) -> None:
    (found,) = json.loads(run(["nbdinfo", "--json", uri(server, f"seq-{SEQ}/root")]).stdout)["exports"]
    assert found["export-name"] == f"{instant}/root"
    assert found["description"] == f"volume root of group {history.group}, intermediary, seq {SEQ}"
    assert (found["export-size"], found["is_read_only"], found["can_multi_conn"], found["can_df"]) == (
        ROOT.size_bytes, True, True, True,
    )  # fmt: skip
    sizes = [found[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 32 * MIB]
    listed = json.loads(run(["nbdinfo", "--list", "--json", f"nbd+unix://?socket={server}"]).stdout)["exports"]
    names = {each["export-name"] for each in listed}
    assert names == {f"{instant_name(history.times_ns[seq])}/{name}" for seq in (0, 16) for name in ("root", "data")}
    assert len(listed) == 6  # latest as well, which says its canonical name


def test_the_map_is_where_the_image_has_data(server: Path, store: Path, instant: str) -> None:
    opened = Store.open(str(store))
    try:
        ranges = list(PointInTimeView(opened, opened.at_seq(SEQ), 0).data_ranges())
    finally:
        opened.close()
    extents = json.loads(run(["nbdinfo", "--map", "--json", uri(server, f"{instant}/root")]).stdout)
    found = [(each["offset"], each["offset"] + each["length"]) for each in extents if not each["type"]]
    assert found == ranges and len(ranges) > 10
    assert {each["type"] for each in extents} == {0, 3}
    mapped = json.loads(run(["qemu-img", "map", "-f", "raw", "--output=json", uri(server, f"{instant}/root")]).stdout)
    merged = [(each["start"], each["start"] + each["length"]) for each in mapped if each["data"]]
    assert merged == ranges


def test_qemu_io_finds_the_patterns_that_were_written(tmp_path: Path) -> None:
    history = History(2, (VolumeInfo("root", 64 * 4096, 4096),))
    ingest = Ingest(str(tmp_path), history.hello)
    ingest_transfer(ingest, history.close_interval())
    for byte in (b"\x11", b"\x22", b"\0"):
        history.write_blocks(0, 3, [byte * 4096] * 2)
    ingest_transfer(ingest, history.close_interval(0))
    ingest.close()
    with Server(Path(ingest.path), tmp_path, "--unix", str(tmp_path / "s")):
        for seq, pattern in ((1, 0x11), (2, 0x22), (3, 0)):
            asked = ["-c", f"read -P {pattern} 12k 8k", "-c", f"read -P {pattern} 13000 7"]
            said = run(["qemu-io", "-r", "-f", "raw", *asked, uri(tmp_path / "s", f"seq-{seq}/root")]).stdout
            assert "Pattern verification failed" not in said and said.count("read ") == 2
        refused = run(["qemu-io", "-f", "raw", "-c", "write 0 4k", uri(tmp_path / "s", "latest/root")], accept=(1,))
        assert "Permission denied" in refused.stderr


@pytest.mark.fuse
def test_nbdfuse_makes_a_file_of_it(server: Path, history: History, tmp_path: Path) -> None:
    directory = tmp_path / "fuse"
    directory.mkdir()
    command = ["nbdfuse", "--readonly", str(directory), uri(server, "bookmarks/start/root")]
    with subprocess.Popen(command) as process:
        try:
            wait_until(lambda: (directory / "nbd").exists(), "nbdfuse mounts", 10)
            assert (directory / "nbd").read_bytes() == history.states[0][0]
        finally:
            subprocess.run(["umount", str(directory)], check=False, capture_output=True)
            process.wait(10)


def test_a_name_that_leads_nowhere_is_said_to_the_client(server: Path) -> None:
    for name, word in (("latest/swap", "volumes are root, data"), ("2001-01-01/root", "nothing can be reached")):
        with pytest.raises(HostError, match=name):
            run(["nbdinfo", uri(server, name)])
        with pytest.raises(HostError, match=word):
            run(["qemu-img", "info", uri(server, name)])


def test_a_damaged_block_is_eio_for_its_range_and_the_rest_is_readable(
    made: tuple[History, Path], tmp_path: Path
) -> None:
    history, intact = made
    store = tmp_path / "store"
    shutil.copytree(intact, store)
    opened = Store.open(str(store))
    view = PointInTimeView(opened, opened.at_seq(SEQ), 0)
    low, high = next((a, b) for a, b in view.data_ranges() if b - a >= 3 * 4096)
    opened.close()
    bad, image = low + 4096, history.states[SEQ][0]
    for path in object_files(store, "*.blocks"):
        with path.open("r+b") as file:
            at = file.read().find(image[bad : bad + 4096])
            if at >= 0:
                file.seek(at + 100)
                file.write(bytes([image[bad + 100] ^ 1]))
    with Server(store, tmp_path, "--unix", str(tmp_path / "s")) as server:
        export = uri(tmp_path / "s", f"seq-{SEQ}/root")
        for ask in (f"read {bad} 4k", f"read {low} {high - low}", f"read {bad + 7} 1"):
            said = run(["qemu-io", "-r", "-f", "raw", "-c", ask, export], accept=(1,))
            assert "Input/output error" in said.stdout + said.stderr
        for ask in (f"read {low} 4k", f"read {bad + 4096} {ROOT.size_bytes - bad - 4096}"):
            run(["qemu-io", "-r", "-f", "raw", "-c", ask, export])
        assert run(["nbdcopy", export, "null:"], accept=(1,)).returncode == 1
        assert f"block {bad // 4096} of volume root doesn't match its checksum" in server.logged()
        server.terminate()


def test_what_is_open_is_held(server: Path, store: Path, instant: str) -> None:
    command = ["qemu-io", "-r", "-f", "raw", uri(server, f"{instant}/root")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:

        def held() -> list[str]:
            status = json.loads(run([*pitfs_command(), "status", store, "--json"]).stdout)
            (holder,) = (each for each in status["holders"] if each["what"].startswith("serve-nbd "))
            assert holder["what"] == f"serve-nbd {server}"
            instants: list[str] = holder["instants"]
            return instants

        wait_until(lambda: held() == [instant], "it is held", 10)
        reader.communicate(b"quit\n")
    wait_until(lambda: held() == [], "it is let go", 10)


# ------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    directory = tmp_path_factory.mktemp("pki")
    ours, other = trustme.CA(), trustme.CA()
    made = {
        "server": issue(directory, "server", ours, "127.0.0.1", "localhost"),
        "client": issue(directory, "client", ours, "client.example"),
        "foreign": issue(directory, "foreign", other, "client.example", trust=ours),
        "distrusting": issue(directory, "distrusting", ours, "client.example", trust=other),
    }
    for name, files in made.items():
        (directory / name).mkdir()
        for path, wanted in zip(files.as_arguments(), CLIENT_FILES, strict=True):
            shutil.copy(path, directory / name / wanted)
    return made


def test_tls_asks_for_certificates_of_both_sides(
    pki: dict[str, Files], store: Path, instant: str, tmp_path: Path, history: History
) -> None:
    port, files = free_port(), pki["server"]
    directory = Path(files.certificate).parent
    options = ["--certificate", files.certificate, "--key", files.key, "--authority", files.authority]
    with Server(store, tmp_path, "--listen", f"localhost:{port}", *options) as server:

        def libnbd(who: str) -> str:
            return f"nbds://localhost:{port}/{instant}/root?tls-certificates={directory / who}"

        def qemu(who: str) -> list[str]:
            credentials = f"tls-creds-x509,id=t,endpoint=client,dir={directory / who}"
            image = f"driver=nbd,host=localhost,port={port},export={instant}/root,tls-creds=t"
            return ["--object", credentials, "--image-opts", image]

        run(["nbdcopy", libnbd("client"), tmp_path / "copy"])
        assert (tmp_path / "copy").read_bytes() == history.states[SEQ][0]
        info = json.loads(run(["nbdinfo", "--json", libnbd("client")]).stdout)
        assert info["TLS"] is True
        run(["qemu-img", "convert", "-O", "raw", *qemu("client"), tmp_path / "converted"])
        assert (tmp_path / "converted").read_bytes() == history.states[SEQ][0]
        for who in ("foreign", "distrusting"):
            run(["nbdinfo", libnbd(who)], accept=(1,))
            run(["qemu-img", "info", *qemu(who)], accept=(1,))
        plain = run(["nbdinfo", f"nbd://localhost:{port}/{instant}/root"], accept=(1,))
        assert instant not in plain.stdout
        assert "TLS" in run(["qemu-img", "info", f"nbd://localhost:{port}/{instant}/root"], accept=(1,)).stderr
        run(["nbdinfo", "--size", libnbd("client")])  # others go on
        assert f"listening at 127.0.0.1:{port}\n" in server.logged() and "('" not in server.logged()
        assert "Traceback" not in server.logged() and "isn't signed by the authority" in server.logged()
        server.terminate()


def test_a_certificate_for_other_groups_reads_nothing(store: Path, tmp_path: Path) -> None:
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    run([*new, "-x509", "-subj", "/CN=a", "-addext", "keyUsage=critical,keyCertSign",
         "-keyout", tmp_path / "ca.key", "-out", tmp_path / "ca-cert.pem"])  # fmt: skip
    for name, group in (("server", "x"), ("mine", "db1"), ("other", "db2")):
        run([*new, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:localhost,URI:pitfs:group:{group}",
             "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / "csr"])  # fmt: skip
        run(["openssl", "x509", "-req", "-in", tmp_path / "csr", "-CA", tmp_path / "ca-cert.pem",
             "-CAkey", tmp_path / "ca.key", "-CAcreateserial", "-copy_extensions", "copy",
             "-out", tmp_path / f"{name}.pem"])  # fmt: skip
        (tmp_path / name).mkdir()
        files = (tmp_path / f"{name}.pem", tmp_path / f"{name}.key", tmp_path / "ca-cert.pem")
        for path, wanted in zip(files, CLIENT_FILES, strict=True):
            shutil.copy(path, tmp_path / name / wanted)
    port = free_port()
    options = [f"--{option}={tmp_path / file}" for option, file in (
        ("certificate", "server.pem"), ("key", "server.key"), ("authority", "ca-cert.pem"),
    )]  # fmt: skip
    with Server(store, tmp_path, "--listen", f"localhost:{port}", *options) as server:
        for name, code in (("mine", 0), ("other", 1)):
            export = f"nbds://localhost:{port}/latest/root?tls-certificates={tmp_path / name}"
            run(["nbdinfo", "--size", export], accept=(code,))
        assert "the certificate of other grants other groups, not db1" in server.logged()


# ------------------------------------------------------------------ the manual


def test_the_limits_that_people_are_told_are_those_that_there_are() -> None:
    assert f"newest {MAX_LISTED_SNAPSHOTS} snapshots" in Path(serve_nbd.__file__).read_text()
    recovery = " ".join(page("pitfs-recovery.7").split())
    assert f"At most {MAX_CONNECTIONS} clients are connected at a time" in recovery


def test_the_commands_of_the_manual_work(
    pki: dict[str, Files], store: Path, instant: str, tmp_path: Path, history: History
) -> None:
    files, port = pki["server"], free_port()
    places = {
        "[::]:10809": f"localhost:{port}",
        "nbds://replica.example": f"nbds://localhost:{port}",
        "/etc/pitfs/receive/certificate.pem": files.certificate,
        "/etc/pitfs/receive/key.pem": files.key,
        "/etc/pitfs/receive/authority.pem": files.authority,
        "/etc/pitfs/nbd": str(Path(files.certificate).parent / "client"),
        "/srv/pitfs/db1": str(store),
        "/run/pitfs-nbd.sock": str(tmp_path / "s"),
        "/var/tmp/root": str(tmp_path / "root"),
        "2026-11-22T23:54:07Z": instant,
    }
    served, listed, copied, mapped, local, overlaid = (
        [re.sub("|".join(map(re.escape, places)), lambda match: places[match[0]], word) for word in words]
        for words in commands("IMAGES ON OTHER HOSTS", "pitfs-recovery.7")
    )
    with Server(store, tmp_path, *served[3:]):
        assert instant_name(history.times_ns[16]) in run(listed).stdout
        run(copied)
        assert (tmp_path / "root.img").read_bytes() == history.states[SEQ][0]
        assert "hole,zero" in run(mapped).stdout
    with Server(store, tmp_path, *local[3:]):
        run(overlaid)
        disk = tmp_path / "root.qcow2"
        for asked in ("write -P 7 4k 4k", "read -P 7 4k 4k"):
            assert "failed" not in run(["qemu-io", "-c", asked, disk]).stdout
        run(["qemu-img", "convert", "-O", "raw", disk, tmp_path / "written"])
        image = history.states[SEQ][0]
        assert (tmp_path / "written").read_bytes() == image[:4096] + b"\7" * 4096 + image[8192:]


# ------------------------------------------------------------------ wrong use


def test_arguments_that_can_not_be_meant_are_one_line(
    store: Path, pki: dict[str, Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, args in (
        ("--listen --unix is required", []),
        ("not allowed with argument", ["--listen", "127.0.0.1:0", "--unix", tmp_path / "s"]),
        ("0.0.0.0 isn't; give certificate", ["--listen", "0.0.0.0:0"]),
        ("all interfaces", ["--listen", ":10809"]),
        ("isn't HOST:PORT", ["--listen", "localhost"]),
        ("--certificate, --authority missing", ["--unix", tmp_path / "s", "--key", pki["server"].key]),
    ):
        assert main(["serve-nbd", str(store), *map(str, args)]) == 2
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and not said.out


def test_what_can_not_be_listened_at_is_one_line(store: Path, tmp_path: Path, server: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "127.0.0.1:{1}".format(*taken.getsockname())

        def refused(code: int, words: str, *args: str | Path) -> Callable[[], str]:
            return lambda: pitfs_refused(code, words, args=["serve-nbd", *args])

        together(
            refused(2, "no such directory", tmp_path / "nothing/there", "--unix", tmp_path / "s"),
            refused(2, "exists and isn't a socket", store, "--unix", tmp_path / "file"),
            refused(2, "at most 107 bytes", store, "--unix", tmp_path / ("x" * 108)),
            refused(1, "No such file or directory", store, "--unix", tmp_path / "no/s"),
            refused(1, "another process listens there", store, "--unix", server),
            refused(1, "is another `pitfs serve-nbd` running", store, "--listen", address),
        )
    assert (tmp_path / "file").exists() and server.exists()


def test_a_socket_that_a_killed_one_left_is_taken_over(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Server(store, tmp_path, "--unix", str(path)) as killed:
        killed.kill()
    assert path.is_socket()
    with Server(store, tmp_path, "--unix", str(path)) as server:
        assert path.stat().st_mode & 0o777 == 0o600
        run(["nbdinfo", "--size", uri(path, "latest/root")])
        assert server.process is not None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
    assert not path.exists()


def test_it_ends_in_order_under_clients_that_read_and_that_do_not(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Server(store, tmp_path, "--unix", str(path)) as server:
        idle = ["qemu-io", "-r", "-f", "raw", uri(path, "latest/root")]
        with subprocess.Popen(idle, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as reader:
            wait_until(lambda: "reads" in server.logged(), "it is connected", 10)
            server.terminate()
            reader.kill()
    assert not path.exists()
