"""Run a plain function on N gloo ranks of this machine, from a warm forkserver.

torch and megatron.core are imported once in the server (about 4 s); each rank is a fork of it
(0.2 s). A plain fork of a process that has run a threaded torch op hangs in the child.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = ["torch", "nvmm.proof.preload"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0
) -> list[Any]:
    """Call `function(rank, world_size, init_method, *args)` on every rank, return the results.

    The function must be importable and calls `Parallel.initialize` itself with the given
    `init_method` (a file:// rendezvous). Raises RuntimeError with the first failing rank's
    traceback, after ending the others; TimeoutError after `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        init_method = f"file://{folder}/rendezvous"
        pipes: dict[Connection, int] = {}
        processes = []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(sender, function, rank, world_size, init_method, args)
            )
            process.start()
            sender.close()
            pipes[receiver] = rank
            processes.append(process)
        try:
            return _collect(pipes, world_size, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: dict[Connection, int], world_size: int, deadline: float) -> list[Any]:
    results: list[Any] = [None] * world_size
    failures: dict[int, str] = {}
    open_pipes = dict(pipes)
    while open_pipes:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                ok, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ok, payload = False, "the process died without a message"
            if ok:
                results[rank] = payload
            else:
                failures[rank] = payload
        if failures:
            # A rank that fails leaves its peers waiting: do not wait for them long. Where only
            # broken connections were reported, the rank that broke them has yet to report.
            patience = 20.0 if all(map(_is_echo, failures.values())) else 1.0
            deadline = min(deadline, time.monotonic() + patience)
    if failures:
        first = min(failures, key=lambda r: (_is_echo(failures[r]), r))
        raise RuntimeError(f"rank {first} of {world_size} failed:\n{failures[first]}")
    if open_pipes:
        raise TimeoutError(f"ranks {sorted(open_pipes.values())} did not finish in time")
    return results


def _is_echo(failure: str) -> bool:
    """Return True when a rank failed only because another one left, by gloo's own words."""
    return "gloo/transport" in failure or "Connection closed" in failure


def _rank(
    sender: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    init_method: str,
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        payload = (True, function(rank, world_size, init_method, *args))
    except BaseException:
        payload = (False, traceback.format_exc())
        code = 1
    # Plain bytes: a Connection would send tensors as shared memory that dies with this process.
    sender.send_bytes(pickle.dumps(payload))
    sender.close()
    # Leave without running the parent's exit handlers in a fork.
    os._exit(code)
