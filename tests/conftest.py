"""What every test run keeps: honest skips (or none), nothing left behind, the same examples every time."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.helpers.netlink import left_namespaces, probe_wire

# Inherited over fork and exec: finds the daemons of this run, whoever their parent is now.
SESSION_MARK = f"PITFS_TEST_SESSION={os.getpid()}"

# Of these files' names: their tests use what a host has once: loop devices, /run/pitfs, network namespaces.
OF_HOST = (
    "attach", "bisect", "demo", "detach", "drill", "filesystem", "full", "holders", "kept", "mount", "postgresql",
    "production", "readme", "scratch", "stop", "torture", "wire",
)  # fmt: skip

hypothesis.settings.register_profile("pitfs", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("pitfs")


def probe_root() -> str | None:
    return None if os.geteuid() == 0 else "needs root"


@functools.cache
def probe_fuse() -> str | None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"needs /dev/fuse: {error.strerror}"
    return probe_root()


@functools.cache
def probe_loop() -> str | None:
    found = subprocess.run(["losetup", "--find"], capture_output=True, text=True, check=False)
    return probe_root() if found.returncode == 0 else f"needs loop devices: {found.stderr.strip()}"


PROBES: dict[str, Callable[[], str | None]] = {
    "root": probe_root,
    "fuse": probe_fuse,
    "loop": probe_loop,
    "wire": probe_wire,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail the run if any test was skipped")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts its background jobs with these ignored, and all that the tests start would inherit it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGQUIT) is signal.SIG_IGN:
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    name, _, value = SESSION_MARK.partition("=")
    os.environ[name] = value
    config.pluginmanager.register(Watch(config), "pitfs-watch")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (pytest -n) one has all tests that use what there is once. The others go file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "host" if any(word in file for word in OF_HOST) else file

    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, probe in PROBES.items():
        if item.get_closest_marker(name) is not None and (reason := probe()) is not None:
            pytest.skip(reason)


class Watch:
    """Fails the run at its end for skipped tests (if asked to) and for what tests left behind."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.skipped: list[str] = []
        self.left: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(report.nodeid)

    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has ended: what it says was left behind by its tests."""
        self.left += getattr(node, "workeroutput", {}).get("left", [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._look()
        forbidden = self.skipped and self.config.option.no_skips
        if (self.left or forbidden) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["left"] = self.left

    def _look(self) -> None:
        if getattr(self.config.option, "numprocesses", None) and not hasattr(self.config, "workerinput"):
            return  # the workers look, each for its own
        factory: pytest.TempPathFactory | None = getattr(self.config, "_tmp_path_factory", None)
        self.left += [*left_processes(), *left_namespaces()]
        if factory is not None:
            # Only below the run's own folder: another run on this machine may have mounts of its own.
            self.left += [*left_mounts(factory.getbasetemp()), *left_loops(factory.getbasetemp())]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.left:
            terminalreporter.write_line(f"left behind by the tests: {line}", red=True)
        if self.config.option.no_skips:
            for nodeid in self.skipped:
                terminalreporter.write_line(f"skipped, which --no-skips forbids: {nodeid}", red=True)


def left_mounts(root: Path) -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        mountpoint, source = line.split()[4], line.partition(" - ")[2].split()[1]
        if any(Path(path).is_relative_to(root) for path in (mountpoint, source)):
            yield f"mount of {source} on {mountpoint}"


def left_loops(root: Path) -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = path.read_text().strip()
        except OSError:  # detached since it was listed
            continue
        if Path(backing).is_relative_to(root):
            yield f"loop device {path.parts[3]} over {backing}"


def left_processes() -> Iterator[str]:
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            marked = SESSION_MARK.encode() in (directory / "environ").read_bytes().split(b"\0")
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # gone meanwhile, or another user's
            continue
        if marked and int(directory.name) != os.getpid():
            yield f"process {directory.name}: {command}"
