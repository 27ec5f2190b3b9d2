"""What client and server agree on before the first request: which option leads to which answer, without I/O.

Where TLS is offered it is required: before it nothing is answered, and what was agreed before it is void.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.nbd import wire
from pitfs.nbd.wire import ExportFlag, Option, Reply, option_reply

_EXPORT_FLAGS: Final = (
    ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY | ExportFlag.CAN_MULTI_CONN | ExportFlag.SEND_CACHE
)
_WITHOUT_DATA: Final = (Option.ABORT, Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY)


class NbdState(enum.Enum):
    """Where a connection is.

    ::

        GREETING ──flags──> OPTIONS <───────────────────────────────────────────────────────┐
                               ├──LIST──> LISTING ──answered────────────────────────────────┤
                               ├──INFO, GO, EXPORT_NAME, contexts──> LOOKUP ──answered──────┤
                               ├──STARTTLS──> TLS_HANDSHAKE ──done──────────────────────────┘
                               ├──ABORT──> CLOSED
                               └──any other option, answered here──> OPTIONS

        LOOKUP ──GO or EXPORT_NAME, and there is such an export──> TRANSMISSION ──DISC──> CLOSED
        LOOKUP ──EXPORT_NAME, and there is no such export: it has no other refusal──> CLOSED

    In LISTING, LOOKUP and TLS_HANDSHAKE the caller has to act; in the others the client's bytes come next.
    """

    GREETING = enum.auto()
    OPTIONS = enum.auto()
    LISTING = enum.auto()
    LOOKUP = enum.auto()
    TLS_HANDSHAKE = enum.auto()
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


_TRANSITIONS: Final[dict[NbdState, tuple[NbdState, ...]]] = {
    NbdState.GREETING: (NbdState.OPTIONS,),
    NbdState.OPTIONS: (NbdState.LISTING, NbdState.LOOKUP, NbdState.TLS_HANDSHAKE, NbdState.CLOSED),
    NbdState.LISTING: (NbdState.OPTIONS,),
    NbdState.LOOKUP: (NbdState.OPTIONS, NbdState.TRANSMISSION, NbdState.CLOSED),
    NbdState.TLS_HANDSHAKE: (NbdState.OPTIONS,),
    NbdState.TRANSMISSION: (NbdState.CLOSED,),
    NbdState.CLOSED: (),
}


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client learns about an export.

    Attributes:
        name: the canonical one, whichever name the client has used.
    """

    name: str
    description: str
    size_bytes: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Send:
    """Bytes that answer what came; to be sent before anything that comes later is answered."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ListExports:
    """The client wants a list of exports: `answer_list`."""


@dataclass(frozen=True, slots=True)
class LookUpExport:
    """The client wants an export by name: `answer_export`.

    Attributes:
        option: what the client wants it for.
        selects: of an option about metadata contexts: whether base:allocation is among those that it names.
    """

    name: str
    option: int
    selects: bool = False

    @property
    def opens(self) -> bool:
        return self.option in (Option.EXPORT_NAME, Option.GO)


@dataclass(frozen=True, slots=True)
class StartTls:
    """Send the data, then shake hands, then call `tls_started`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """The client leaves: send the data, answer what is under way, close."""

    data: bytes = b""


Answer = Send | ListExports | LookUpExport | StartTls | Close


class Negotiation:
    """The server's side of it, for one connection.

    Attributes:
        state: changed by `move` alone.
        structured: whether replies are structured; a client that didn't ask for that gets simple ones.
        has_status: whether the client may ask for the block status of the export that it has opened.
    """

    def __init__(self, *, offers_tls: bool) -> None:
        self.state = NbdState.GREETING
        self.structured = False
        self.has_status = False
        self._no_zeroes = False
        self._offers_tls, self._has_tls = offers_tls, False
        self._lookup = LookUpExport("", 0)  # in LOOKUP: what is under way
        self._context_of: str | None = None  # name of the export that base:allocation was selected for

    def move(self, here: NbdState, there: NbdState) -> None:
        """Changes the state from `here` to `there`.

        Raises:
            LocalProtocolError: the state isn't `here`: the caller's answer isn't due.
        """
        if self.state is not here or there not in _TRANSITIONS[here]:
            raise LocalProtocolError(f"from {here.name} to {there.name}, in state {self.state.name}")
        self.state = there

    def answer_flags(self, flags: int) -> None:
        """Takes the client's flags; they have no reply.

        Raises:
            RemoteProtocolError: they can only be answered by closing the connection.
        """
        if flags & ~(wire.FIXED_NEWSTYLE | wire.NO_ZEROES):
            raise RemoteProtocolError(f"not a client of NBD, or one of a later version: flags {flags:#x}")
        self._no_zeroes = bool(flags & wire.NO_ZEROES)
        self.move(NbdState.GREETING, NbdState.OPTIONS)

    def answer_option(self, option: int, data: memoryview) -> Answer:
        """The answer to an option, or what the caller has to do for it.

        Raises:
            RemoteProtocolError: it can only be answered by closing the connection.
        """
        if self._offers_tls and not self._has_tls and option not in (Option.STARTTLS, Option.ABORT):
            if option == Option.EXPORT_NAME:
                raise RemoteProtocolError("EXPORT_NAME before TLS")
            return Send(option_reply(option, Reply.ERR_TLS_REQD, b"begin with STARTTLS"))
        if data and option in _WITHOUT_DATA:
            return _invalid(option, "this option has no data")
        match option:
            case Option.ABORT:
                self.move(NbdState.OPTIONS, NbdState.CLOSED)
                return Close(option_reply(option, Reply.ACK))
            case Option.STARTTLS if self._has_tls:
                return _invalid(option, "TLS is there already")
            case Option.STARTTLS if not self._offers_tls:
                return Send(option_reply(option, Reply.ERR_POLICY, b"this server has no certificate"))
            case Option.STARTTLS:
                self.move(NbdState.OPTIONS, NbdState.TLS_HANDSHAKE)
                return StartTls(option_reply(option, Reply.ACK))
            case Option.STRUCTURED_REPLY:
                self.structured = True
                return Send(option_reply(option, Reply.ACK))
            case Option.LIST:
                self.move(NbdState.OPTIONS, NbdState.LISTING)
                return ListExports()
            case Option.EXPORT_NAME:
                name = wire.text(data)
                if name is None:
                    raise RemoteProtocolError("EXPORT_NAME with an invalid name")
                return self._look_up(LookUpExport(name, option))
            case Option.INFO | Option.GO:
                name, rest = wire.counted_text(data)
                # Behind the name come the numbers of what the client wants to know, u16 each. It gets
                # everything.
                if name is None or len(rest) < 2 or len(rest) != 2 + 2 * wire.U16.unpack_from(rest)[0]:
                    return _invalid(option, "malformed")
                return self._look_up(LookUpExport(name, option))
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                return self._look_up_contexts(option, data)
        return Send(option_reply(option, Reply.ERR_UNSUP, b"this server doesn't know that option"))

    def _look_up_contexts(self, option: int, data: memoryview) -> Send | LookUpExport:
        lists = option == Option.LIST_META_CONTEXT
        if not lists:
            self._context_of = None
        if not self.structured:
            return _invalid(option, "structured replies come first")
        name, rest = wire.counted_text(data)
        if name is None or len(rest) < wire.U32.size:
            return _invalid(option, "malformed")
        (count,), rest = wire.U32.unpack_from(rest), rest[wire.U32.size :]
        selects = lists and not count
        for _ in range(count):
            query, rest = wire.counted_text(rest)
            if query is None:
                return _invalid(option, "malformed")
            selects = selects or query == wire.CONTEXT or (lists and query == "base:")
        if rest:
            return _invalid(option, "malformed")
        return self._look_up(LookUpExport(name, option, selects))

    def _look_up(self, lookup: LookUpExport) -> LookUpExport:
        self.move(NbdState.OPTIONS, NbdState.LOOKUP)
        self._lookup = lookup
        return lookup

    def answer_list(self, exports: Iterable[tuple[str, str]]) -> bytes:
        """The reply to ListExports: names and descriptions."""
        self.move(NbdState.LISTING, NbdState.OPTIONS)
        replies = [
            option_reply(Option.LIST, Reply.SERVER, wire.counted(name) + description.encode())
            for name, description in exports
        ]
        return b"".join(replies) + option_reply(Option.LIST, Reply.ACK)

    def answer_export(self, export: ExportInfo | None, problem: str = "") -> bytes:
        """The reply to LookUpExport: the export, or None and why there is none."""
        option, name, selects = self._lookup.option, self._lookup.name, self._lookup.selects
        if export is None and option == Option.EXPORT_NAME:
            self.move(NbdState.LOOKUP, NbdState.CLOSED)
            return b""
        opened = export is not None and self._lookup.opens
        self.move(NbdState.LOOKUP, NbdState.TRANSMISSION if opened else NbdState.OPTIONS)
        if export is None:
            return option_reply(option, Reply.ERR_UNKNOWN, problem.encode()[: wire.MAX_NAME_BYTES])
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            number = 0
            if option == Option.SET_META_CONTEXT:
                number, self._context_of = wire.CONTEXT_ID, name if selects else None
            context = wire.U32.pack(number) + wire.CONTEXT.encode()
            selected = option_reply(option, Reply.META_CONTEXT, context) if selects else b""
            return selected + option_reply(option, Reply.ACK)
        self.has_status = self.structured and self._context_of == name
        flags = _EXPORT_FLAGS | ExportFlag.SEND_DF if self.structured else _EXPORT_FLAGS
        if option == Option.EXPORT_NAME:
            zeroes = b"" if self._no_zeroes else bytes(wire.ZEROES_BYTES)
            return wire.SIZE_AND_FLAGS.pack(export.size_bytes, flags) + zeroes
        infos = wire.infos(export.size_bytes, flags, export.block_size, export.name, export.description)
        replies = [option_reply(option, Reply.INFO, info) for info in infos]
        return b"".join(replies) + option_reply(option, Reply.ACK)

    def tls_started(self) -> None:
        """The handshake is done: all comes through TLS from now on, and what was agreed before is void."""
        self.move(NbdState.TLS_HANDSHAKE, NbdState.OPTIONS)
        self._has_tls = True
        self.structured, self._context_of = False, None


def _invalid(option: int, problem: str) -> Send:
    return Send(option_reply(option, Reply.ERR_INVALID, problem.encode()))
