"""``python -m tests.stages CHAIN...``: runs chains of make targets in parallel, and prints the time of each target.

A chain is one argument with targets that run in order, ``"style types"``. The first chain writes to the terminal
directly, the others print their output when they end, so that no line is broken. All chains run to the end.
"""

import concurrent.futures
import subprocess
import sys
import time


def _target(name, *, aside):
    """Run one target; returns its exit status and its seconds."""
    begun = time.perf_counter()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if aside else {}
    done = subprocess.run(["make", "--no-print-directory", name], **output, check=False)
    if aside and (done.returncode or done.stdout.strip()):
        print(f"\n{name}:\n{done.stdout}", end="", flush=True)
    return name, done.returncode, time.perf_counter() - begun


def run(*chains):
    """Run the chains, print the times, and return the number of targets that failed."""
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(chains)) as pool:
        tasks = [
            pool.submit(lambda names, aside: [_target(name, aside=aside) for name in names], chain.split(), number > 0)
            for number, chain in enumerate(chains)
        ]
        results = [result for task in tasks for result in task.result()]
    print("\nstage      seconds")
    for name, status, seconds in [*results, ("all", 0, time.perf_counter() - begun)]:
        print(f"{name:10} {seconds:7.0f}{'  failed' * bool(status)}")
    return sum(status != 0 for _, status, _ in results)


if __name__ == "__main__":
    sys.exit(min(1, run(*sys.argv[1:])))
