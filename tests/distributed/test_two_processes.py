"""Two processes on the loopback interface: the results of one process, and no waiting for a process that died."""

import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.distributed import two_processes

ROOT = pathlib.Path(__file__).parent.parent.parent
WITHIN = 60  # seconds, on a busy machine; the timeout of the heartbeat is shorter

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tmp_path):
    """Start processes on one port, and end all of them afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []

    def one(number, *options):
        log = (tmp_path / f"{number}.txt").open("w")
        command = [
            sys.executable,
            "-u",
            "-m",
            "tests.distributed.two_processes",
            str(tmp_path / f"{number}.npz"),
            number,
            port,
        ]
        started.append((subprocess.Popen([*command, *options], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT), log))
        return started[-1][0]

    yield one
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


def test_two_processes_compute_what_one_does(start, tmp_path):
    processes = [start(number) for number in ("0", "1", "alone")]
    for process in processes:
        process.wait(timeout=300)
    assert [process.returncode for process in processes] == [0, 0, 0], (tmp_path / "0.txt").read_text()
    two, one = np.load(tmp_path / "0.npz"), np.load(tmp_path / "alone.npz")
    assert {*two} == {f"{name} {c}" for name in two_processes.METHODS for c in (False, True)} == {*one}
    for name in one:
        assert np.ptp(one[name]) > 0.1
        np.testing.assert_allclose(two[name], one[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dying", ["0", "1"])
def test_the_death_of_a_process_is_an_error_for_the_other(start, tmp_path, dying):
    other = {"0": "1", "1": "0"}[dying]
    survivor, victim = start(other, dying), start(dying, dying)
    assert victim.wait(timeout=300) == -signal.SIGKILL, (tmp_path / f"{dying}.txt").read_text()
    died = time.monotonic()
    assert survivor.wait(timeout=WITHIN) != 0
    assert time.monotonic() - died < WITHIN
    told = (tmp_path / f"{other}.txt").read_text()
    messages = ["Gloo", "the JAX distributed service detected fatal errors"]
    assert any(message in told for message in messages), told
    assert "another task died" in told or "by peer" in told, told
    assert not (tmp_path / "0.npz").exists()
