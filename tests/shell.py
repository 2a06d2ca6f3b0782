"""The command line as tests use it."""

import sys

import pytest
from typer.testing import CliRunner

from assign.cli import app, main


def run(*arguments, code=0):
    """What a command prints; it must leave with ``code``."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def fails(capsys, monkeypatch, *arguments):
    """What a command that must be refused says, in one line."""
    monkeypatch.setattr(sys, "argv", ["assign", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.split())
