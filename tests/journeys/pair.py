"""Two processes that run command lines one after the other, started from outside as torchrun or mpirun would.

One import of torch serves both, which saves seconds. ``python pair.py JOBS RESULTS``: JOBS is a JSON list of
{"arguments": [...], "sigterm": n}; with ``sigterm`` process 1 gets SIGTERM at its n-th batch. RESULTS gets
``0.json`` and ``1.json``: what each process made of each job.
"""

import json
import os
import signal
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path


def run(jobs, rank):
    from certipatch.cli.app import main as cli_main
    from certipatch.models.weights import weights_sha256
    from certipatch.training import batches, loop, train

    stack, fit, results = batches.stack, loop.fit, []
    for job in jobs:
        calls, weights = [], []

        def counted(items, calls=calls, job=job):
            calls.append(1)
            if rank == 1 and len(calls) == job.get("sigterm"):
                os.kill(os.getpid(), signal.SIGTERM)
            return stack(items)

        def fitted(model, *arguments, weights=weights, **options):
            fit(model, *arguments, **options)
            weights.append(weights_sha256(model))

        batches.stack, train.fit = counted, fitted
        sys.argv = ["certipatch", *job["arguments"]]
        code, out, err = 0, StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                cli_main()
            except SystemExit as stop:
                code = stop.code or 0
        results.append(
            {
                "code": code,
                "out": out.getvalue(),
                "err": err.getvalue(),
                "batches": len(calls),
                "weights": weights,
            }
        )
    return results


def main():
    import certipatch.training  # noqa: F401, before the fork

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    child = os.fork()
    rank = 0 if child else 1
    os.environ["LOCAL_RANK"] = str(rank)
    results = Path(sys.argv[2], f"{rank}.json")
    results.write_text(json.dumps(run(json.loads(sys.argv[1]), rank)))
    if child:
        os.waitpid(child, 0)


main()
