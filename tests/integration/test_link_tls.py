"""TLS with certificates of both sides, and each way in which it is refused: one clear message."""

from __future__ import annotations

import datetime
import hashlib
import ssl
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio
import trustme

from pitfs.config.grants import load_grants
from pitfs.errors import (
    ConfigError,
    LinkError,
    LinkRefusedError,
    PitfsError,
    RemoteProtocolError,
    UsageError,
)
from pitfs.link.sessions.connect import connect
from pitfs.link.transport.streams import TlsStream
from pitfs.link.transport.tls import client_context, is_granted, require_loopback, server_context
from pitfs.model.endpoint import is_loopback
from tests.helpers.links import HELLO, MANIFEST, FakeIngest, Files, issue, replica
from tests.integration.test_link import NOISE, ship

END = "-----END CERTIFICATE-----\n"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    directory = tmp_path_factory.mktemp("pki")
    ours, other = trustme.CA(), trustme.CA()
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    return {
        "replica": issue(directory, "replica", ours, "127.0.0.1", "localhost"),
        "production": issue(directory, "production", ours, "production.example"),
        "elsewhere": issue(directory, "elsewhere", ours, "elsewhere.example"),
        "expired": issue(directory, "expired", ours, "127.0.0.1", not_after=past),
        "foreign": issue(directory, "foreign", other, "127.0.0.1", trust=ours),
        "distrusting": issue(directory, "distrusting", ours, "127.0.0.1", trust=other),
    }


async def attempt(port: int, context: ssl.SSLContext | None) -> None:
    with trio.fail_after(10):
        async with connect("127.0.0.1", port, tls=context, hello=HELLO, rate_bytes_per_s=None) as session:  # type: ignore[arg-type]
            await session.begin(MANIFEST)


def client(files: Files) -> ssl.SSLContext:
    return client_context(*files.as_arguments())


async def test_transfers_go_over_tls_1_3(pki: dict[str, Files]) -> None:
    made: list[FakeIngest] = []

    def open_ingest(hello: object) -> FakeIngest:
        made.append(FakeIngest(HELLO))
        return made[-1]

    async with (
        replica(open_ingest, server_context(*pki["replica"].as_arguments())) as port,
        connect(
            "localhost",
            port,
            tls=client_context(*pki["production"].as_arguments()),
            hello=HELLO,
            rate_bytes_per_s=None,
        ) as session,
    ):
        assert session.connection.stream._tls.version() == "TLSv1.3"  # type: ignore[attr-defined]
        await ship(session, 20)
    assert bytes(made[0].sections[1]) == NOISE * 20 and made[0].closed


@pytest.mark.parametrize(
    ("server", "sender", "words"),
    [
        ("replica", "expired", "our certificate .*expired.certificate.pem has expired"),
        (
            "replica",
            "foreign",
            "doesn't know the authority that signed our certificate .*foreign.certificate.pem",
        ),
        ("expired", "production", "its certificate has expired"),
        ("foreign", "production", "isn't signed by the authority .*production.authority.pem"),
        ("distrusting", "production", "doesn't know the authority that signed our certificate"),
        ("replica", "distrusting", "isn't signed by the authority .*distrusting.authority.pem"),
        ("elsewhere", "production", "its certificate is for another host"),
    ],
)
async def test_a_certificate_that_is_not_right_is_refused_with_the_file_to_look_at(
    pki: dict[str, Files], server: str, sender: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with replica(FakeIngest, server_context(*pki[server].as_arguments())) as port:
        with pytest.raises(LinkRefusedError, match=f"127.0.0.1:{port}: .*{words}") as caught:
            await attempt(port, client(pki[sender]))
        assert not caught.value.retryable
        await attempt_well_or_not(port, pki, server)
    assert caplog.text.count("refused") >= 1 and "Traceback" not in caplog.text


async def attempt_well_or_not(port: int, pki: dict[str, Files], server: str) -> None:
    if server == "replica":  # others go on
        await attempt(port, client(pki["production"]))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_certificate_is_refused(pki: dict[str, Files], version: ssl.TLSVersion) -> None:
    bare = ssl.create_default_context(cafile=pki["production"].authority)
    bare.maximum_version = version
    async with replica(FakeIngest, server_context(*pki["replica"].as_arguments())) as port:
        with pytest.raises(LinkRefusedError, match=r"wants a certificate and got none|no certificate"):
            await attempt(port, _named(bare))


def _named(context: ssl.SSLContext) -> ssl.SSLContext:
    context.certificate_file = context.authority_file = "(none)"  # type: ignore[attr-defined]
    return context


async def test_tls_1_1_is_refused_on_both_sides(pki: dict[str, Files]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        sender, receiver = client(pki["production"]), server_context(*pki["replica"].as_arguments())
        for context in (sender, receiver):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
            context.set_ciphers("ALL:@SECLEVEL=0")
    async with replica(FakeIngest, server_context(*pki["replica"].as_arguments())) as port:
        with pytest.raises(LinkRefusedError, match="doesn't speak our versions of TLS"):
            await attempt(port, sender)
    async with replica(FakeIngest, receiver) as port:
        with pytest.raises(LinkRefusedError, match="doesn't speak our versions of TLS"):
            await attempt(port, client(pki["production"]))


async def test_plain_text_into_a_tls_port_is_refused_and_said_on_both_sides(
    pki: dict[str, Files], caplog: pytest.LogCaptureFixture
) -> None:
    async with replica(FakeIngest, server_context(*pki["replica"].as_arguments())) as port:
        with pytest.raises(PitfsError, match=r"speaks TLS|want TLS"):
            await attempt(port, None)
        with trio.fail_after(5):
            while "doesn't speak TLS" not in caplog.text:
                await trio.sleep(0.01)


async def test_tls_into_a_plain_port_is_refused_and_said_on_both_sides(
    pki: dict[str, Files], caplog: pytest.LogCaptureFixture
) -> None:
    async with replica(FakeIngest) as port:
        with pytest.raises(LinkRefusedError, match="it doesn't speak TLS"):
            await attempt(port, client(pki["production"]))
        with trio.fail_after(5):
            while "it speaks TLS and this side doesn't" not in caplog.text:
                await trio.sleep(0.01)


async def test_a_pitfs_peer_that_ends_in_the_handshake_is_said(pki: dict[str, Files]) -> None:
    async def leave(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, leave, [listener])
        with pytest.raises(LinkError, match="closed the connection in the TLS handshake"):
            await attempt(listener.socket.getsockname()[1], client(pki["production"]))
        nursery.cancel_scope.cancel()


async def test_a_certificate_for_other_groups_is_refused(
    pki: dict[str, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (("DNS", "production.example"), ("URI", "pitfs:group:db2"))
    monkeypatch.setattr(
        "pitfs.link.transport.streams.TlsStream.peer_certificate", lambda self: {"subjectAltName": names}
    )
    async with replica(FakeIngest, server_context(*pki["replica"].as_arguments())) as port:
        with pytest.raises(LinkRefusedError, match="the certificate doesn't grant group db1"):
            await attempt(port, client(pki["production"]))
        hello = msgspec.structs.replace(HELLO, group="db2")
        context = client(pki["production"])
        async with connect("127.0.0.1", port, tls=context, hello=hello, rate_bytes_per_s=None):  # type: ignore[arg-type]
            pass


async def test_a_grants_file_says_which_certificate_may_write_which_group(
    pki: dict[str, Files], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "grants.toml"
    der = ssl.PEM_cert_to_DER_cert(Path(pki["elsewhere"].certificate).read_text().split("-----END")[0] + END)
    digest = hashlib.sha256(der).hexdigest().upper()
    colons = ":".join(digest[i : i + 2] for i in range(0, 64, 2))
    tls = server_context(*pki["replica"].as_arguments())
    async with replica(FakeIngest, tls, read_grants=partial(load_grants, str(file))) as port:

        async def may(who: str) -> bool:
            try:
                await attempt(port, client(pki[who]))
            except LinkRefusedError as error:
                assert "grants don't let this certificate write group db1" in str(error)
                return False
            return True

        file.write_text('[groups]\ndb1 = ["production.example"]\n')
        assert await may("production") and not await may("elsewhere")
        file.write_text(f'[groups]\ndb2 = ["production.example"]\ndb1 = ["sha256:{colons}"]\n')
        assert not await may("production") and await may("elsewhere")
        file.write_text("[groups]\ndb1 = 7\n")
        with pytest.raises(LinkError, match="can't read who may write which group"):
            await attempt(port, client(pki["production"]))
        assert f"no sender is admitted: {file}: line 2, groups.db1: must be a list" in caplog.text
        file.unlink()
        with pytest.raises(LinkError, match="can't read who may write which group"):
            await attempt(port, client(pki["production"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[group]\n", "did you mean 'groups'"),
        ("[groups]\n'a/b' = ['x']\n", "a/b"),
        ("[groups]\na = []\n", "must be a list of texts"),
        ("[groups]\na = ['sha256:12']\n", "64 hex digits"),
        ("a b", "isn't valid TOML"),
    ],
)
def test_a_grants_file_that_can_not_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "grants.toml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_grants(str(tmp_path / "grants.toml"))


def test_a_certificate_without_grants_may_send_all_groups_and_one_with_grants_those() -> None:
    assert is_granted({}, "db1") and is_granted({"subjectAltName": (("DNS", "pitfs:group:x"),)}, "db1")
    granted = {"subjectAltName": (("URI", "pitfs:group:a"), ("URI", "pitfs:group:b"))}
    assert is_granted(granted, "a") and is_granted(granted, "b") and not is_granted(granted, "ab")


def test_files_that_cannot_be_used_are_named(pki: dict[str, Files], tmp_path: Path) -> None:
    good, other = pki["replica"], pki["production"]
    garbage = tmp_path / "garbage.pem"
    garbage.write_bytes(b"\x30\x82 not PEM")
    torn = tmp_path / "torn.pem"
    torn.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n")
    missing = str(tmp_path / "missing.pem")
    for build in (client_context, server_context):
        cases = [
            ((missing, good.key, good.authority), f"{missing}: can't read the certificate: No such file"),
            ((good.certificate, missing, good.authority), f"{missing}: can't read the key"),
            ((good.certificate, good.key, missing), f"{missing}: can't read the authority"),
            ((good.certificate, good.key, str(tmp_path)), f"{tmp_path}: can't read the authority: Is a dir"),
            ((str(garbage), good.key, good.authority), f"{garbage}: the certificate isn't a PEM file"),
            ((good.certificate, other.key, good.authority), f"{other.key}: this key isn't the one of"),
            ((good.certificate, good.certificate, good.authority), "can't be used as certificate and key"),
            ((good.certificate, good.key, str(torn)), f"{torn}: no certificates in PEM form"),
            ((good.certificate, good.key, good.key), f"{good.key}: no certificates in PEM form"),
        ]
        for arguments, words in cases:
            with pytest.raises(UsageError) as caught:
                build(*arguments)
            assert words in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.4.5", "::1", "localhost"])
def test_loopback_may_go_without_tls(host: str) -> None:
    require_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.0.2.1", "2001:db8::1", "nobody.invalid", "a" * 70]
)
def test_anything_else_may_not(host: str) -> None:
    with pytest.raises(UsageError):
        require_loopback(host)


def test_loopback_addresses_are_known_in_every_form() -> None:
    assert is_loopback("::ffff:127.0.0.1") and is_loopback("::1%lo") and is_loopback("127.255.0.1")
    assert not is_loopback("::ffff:192.0.2.1") and not is_loopback("fe80::1%eth0")


def test_a_remote_protocol_error_is_a_link_error_that_may_be_retried() -> None:
    assert issubclass(RemoteProtocolError, LinkError) and RemoteProtocolError("x").retryable


async def test_what_comes_behind_the_end_of_tls_is_not_received(pki: dict[str, Files]) -> None:
    pair = [trio.SocketStream(side) for side in trio.socket.socketpair()]
    sender = TlsStream(pair[0], client(pki["production"]), "127.0.0.1")
    receiver = TlsStream(pair[1], server_context(*pki["replica"].as_arguments()))
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.do_handshake)
            nursery.start_soon(receiver.do_handshake)
        await sender.send_all(b"the last words")
        with suppress(ssl.SSLWantReadError):
            sender._tls.unwrap()
        await sender._flush()
        for _ in range(3):
            await pair[0].send_all(b"more and more" * 100)
        assert bytes(await receiver.receive_some()) == b"the last words"
        for _ in range(3):
            assert await receiver.receive_some() == b""
        held = receiver._incoming.pending
        await pair[0].send_all(b"more and more" * 100)
        assert await receiver.receive_some() == b"" and receiver._incoming.pending == held
    for side in (sender, receiver):
        await side.aclose()
