"""The command line of the experiments, called within a test."""

import sys

import pytest

from experiments import __main__ as cli
from experiments import trained


@pytest.fixture
def never_run(monkeypatch):
    """Nothing is trained: what is run instead says so."""
    started = []
    monkeypatch.setattr(
        trained, "run", lambda config, directory, console: started.append(directory.name) or [{"bits": 1.0}]
    )
    return started


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls the command line: its exit code, what it prints and what it says on stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        assert err.count("\n") == (1 if code else err.count("\n")), err
        return code, out, err

    return call
