"""Fixtures that call the command line of the experiments within a test."""

import sys

import pytest

from experiments import __main__ as cli
from experiments import trained


@pytest.fixture
def never_run(monkeypatch):
    """Replace training by a stub, and list the runs that it would make."""
    started = []
    monkeypatch.setattr(
        trained, "run", lambda config, directory, console: started.append(directory.name) or [{"bits": 1.0}]
    )
    return started


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command line: exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["experiments", *map(str, arguments)])
        code = cli.main()
        out, err = capsys.readouterr()
        assert err.count("\n") == (1 if code else err.count("\n")), err
        return code, out, err

    return call
