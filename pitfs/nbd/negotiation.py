"""What client and server agree on before the first request: which option leads to which answer, without I/O.

Where TLS is offered it is required: nothing is told before it, and what was agreed before is void.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pitfs.errors import LocalProtocolError, RemoteProtocolError
from pitfs.nbd.wire import (
    CONTEXT,
    CONTEXT_ID,
    MAX_NAME_BYTES,
    U16,
    U32,
    ZEROES_BYTES,
    ExportFlag,
    Info,
    Option,
    Reply,
    counted,
    infos,
    option_reply,
)

_EXPORT_FLAGS: Final = (
    ExportFlag.HAS_FLAGS | ExportFlag.READ_ONLY | ExportFlag.CAN_MULTI_CONN | ExportFlag.SEND_CACHE
)
_ALONE: Final = (Option.ABORT, Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY)  # options without data


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told of an export.

    Attributes:
        name: the canonical one, whatever name it was asked for by.
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
class AskList:
    """Which exports to list: `answer_list`."""


@dataclass(frozen=True, slots=True)
class AskExport:
    """Whether there is an export of that name: `answer_export`. If there is, and it `opens`, it is the client's."""

    name: str
    opens: bool


@dataclass(frozen=True, slots=True)
class StartTls:
    """Send the data, then shake hands, then call `tls_started`."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """The client takes its leave: send the data, answer what is under way, close."""

    data: bytes = b""


@dataclass(frozen=True, slots=True)
class _Question:
    """An option that waits for the caller's answer."""

    option: int
    name: str = ""
    selects: bool = False  # of the metadata contexts: whether base:allocation is among those asked for


class Negotiation:
    """The server's side of it, for one connection.

    Attributes:
        structured: whether replies are to be structured; a client without gets simple ones.
        chosen: the export that the client has opened; no option comes any more.
        has_status: whether it may ask for the block status of that one.
        is_over: there will be no export; the connection is to be closed.
        awaits_tls: the handshake of TLS comes next.
    """

    def __init__(self, *, offers_tls: bool) -> None:
        self.structured = False
        self.chosen: ExportInfo | None = None
        self.has_status = False
        self.is_over = False
        self.awaits_tls = False
        self.no_zeroes = False  # the client said so in its flags
        self._offers_tls, self._has_tls = offers_tls, False
        self._question: _Question | None = None
        self._context_of: str | None = None  # name of the export that base:allocation was selected for

    @property
    def is_asking(self) -> bool:
        """Whether an option waits for `answer_list` or `answer_export`."""
        return self._question is not None

    def option(self, option: int, data: memoryview) -> Send | AskList | AskExport | StartTls | Close:
        """What to do about an option.

        Raises:
            RemoteProtocolError: it can only be answered by closing the connection.
        """
        if self._offers_tls and not self._has_tls and option not in (Option.STARTTLS, Option.ABORT):
            if option == Option.EXPORT_NAME:
                raise RemoteProtocolError("EXPORT_NAME before TLS")
            return Send(option_reply(option, Reply.ERR_TLS_REQD, b"begin with STARTTLS"))
        if data and option in _ALONE:
            return _invalid(option, "this option has no data")
        match option:
            case Option.ABORT:
                self.is_over = True
                return Close(option_reply(option, Reply.ACK))
            case Option.STARTTLS:
                return self._start_tls()
            case Option.STRUCTURED_REPLY:
                self.structured = True
                return Send(option_reply(option, Reply.ACK))
            case Option.LIST:
                self._question = _Question(option)
                return AskList()
            case Option.EXPORT_NAME:
                name = _text(data)
                if name is None:
                    raise RemoteProtocolError("EXPORT_NAME with a name that isn't one")
                return self._ask(_Question(option, name))
            case Option.INFO | Option.GO:
                return self._ask_export(option, data)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                return self._ask_contexts(option, data)
        return Send(option_reply(option, Reply.ERR_UNSUP, b"this server doesn't know that option"))

    def _start_tls(self) -> Send | StartTls:
        if self._has_tls:
            return _invalid(Option.STARTTLS, "TLS is there already")
        if not self._offers_tls:
            return Send(option_reply(Option.STARTTLS, Reply.ERR_POLICY, b"this server has no certificate"))
        self.awaits_tls = True
        return StartTls(option_reply(Option.STARTTLS, Reply.ACK))

    def _ask_export(self, option: int, data: memoryview) -> Send | AskExport:
        name, rest = _counted_text(data)
        # Behind the name what is asked for, u16 each; all that there is to tell is told anyway.
        if name is None or len(rest) < 2 or len(rest) != 2 + 2 * U16.unpack_from(rest)[0]:
            return _invalid(option, "malformed")
        return self._ask(_Question(option, name))

    def _ask_contexts(self, option: int, data: memoryview) -> Send | AskExport:
        if option == Option.SET_META_CONTEXT:
            self._context_of = None
        if not self.structured:
            return _invalid(option, "structured replies come first")
        name, rest = _counted_text(data)
        if name is None or len(rest) < U32.size:
            return _invalid(option, "malformed")
        (count,), rest = U32.unpack_from(rest), rest[U32.size :]
        lists = option == Option.LIST_META_CONTEXT
        selects = lists and not count
        for _ in range(count):
            query, rest = _counted_text(rest)
            if query is None:
                return _invalid(option, "malformed")
            selects = selects or query == CONTEXT or (lists and query == "base:")
        if rest:
            return _invalid(option, "malformed")
        return self._ask(_Question(option, name, selects))

    def _ask(self, question: _Question) -> AskExport:
        self._question = question
        return AskExport(question.name, question.option in (Option.EXPORT_NAME, Option.GO))

    def _answered(self, *options: Option) -> _Question:
        question = self._question
        if question is None or question.option not in options:
            raise LocalProtocolError("an answer that nobody asked for")
        self._question = None
        return question

    def answer_list(self, exports: Iterable[tuple[str, str]]) -> bytes:
        """The answer to AskList: names and descriptions."""
        question = self._answered(Option.LIST)
        replies = [
            option_reply(question.option, Reply.SERVER, counted(name) + description.encode())
            for name, description in exports
        ]
        return b"".join(replies) + option_reply(question.option, Reply.ACK)

    def answer_export(self, export: ExportInfo | None, problem: str = "") -> bytes:
        """The answer to AskExport: the export, or None and why not."""
        question = self._answered(
            Option.EXPORT_NAME, Option.INFO, Option.GO, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
        )
        option = question.option
        if option == Option.SET_META_CONTEXT:
            self._context_of = question.name if export is not None and question.selects else None
        if export is None:
            if option == Option.EXPORT_NAME:
                self.is_over = True  # it has no other way to say no
                return b""
            return option_reply(option, Reply.ERR_UNKNOWN, problem.encode()[:MAX_NAME_BYTES])
        if option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            context = U32.pack(CONTEXT_ID if option == Option.SET_META_CONTEXT else 0) + CONTEXT.encode()
            selected = option_reply(option, Reply.META_CONTEXT, context) if question.selects else b""
            return selected + option_reply(option, Reply.ACK)
        flags = _EXPORT_FLAGS | ExportFlag.SEND_DF if self.structured else _EXPORT_FLAGS
        texts = [(Info.NAME, export.name), (Info.DESCRIPTION, export.description)]
        told = infos(export.size_bytes, flags, export.block_size, texts)
        if option != Option.INFO:
            self.chosen = export
            self.has_status = self.structured and self._context_of == question.name
        if option == Option.EXPORT_NAME:
            return told[0][2:] + (b"" if self.no_zeroes else bytes(ZEROES_BYTES))
        return b"".join(option_reply(option, Reply.INFO, each) for each in told) + option_reply(option, Reply.ACK)

    def tls_started(self) -> None:
        """Everything from now on comes through TLS; what was agreed before is void."""
        assert self.awaits_tls
        self.awaits_tls, self._has_tls = False, True
        self.structured, self._context_of = False, None


def _invalid(option: int, problem: str) -> Send:
    return Send(option_reply(option, Reply.ERR_INVALID, problem.encode()))


def _text(data: memoryview) -> str | None:
    if len(data) > MAX_NAME_BYTES:
        return None
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        return None


def _counted_text(data: memoryview) -> tuple[str | None, memoryview]:
    """A text behind its length, and what follows; None if there is none."""
    if len(data) < U32.size:
        return None, data
    end = U32.size + U32.unpack_from(data)[0]
    return (_text(data[U32.size : end]), data[end:]) if end <= len(data) else (None, data)
