"""Commands run in this process, as a user types them."""

from __future__ import annotations

import pytest

from pitfs.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == code
    output = capsys.readouterr()
    assert code == 0 or (output.out == "" and output.err.count("\n") == 1)
    return output.out if code == 0 else output.err
