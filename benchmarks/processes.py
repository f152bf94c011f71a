"""Runs a function on several processes that know one another, as Fabric starts them, without a new interpreter for each."""

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def silence() -> None:
    """Nothing that this process prints is seen any more."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def _rank(
    rank: int, size: int, port: int, function: Callable[[int], Any], out: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(port)
    code = 0
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        out.send_bytes(pickle.dumps(function(rank)))
    except BaseException as error:
        traceback.print_exc()
        out.send_bytes(pickle.dumps(error))
        code = 1
    finally:
        out.close()
        os._exit(code)


class Job:
    """Processes at one function, which is called on each with its number.

    Args:
        size: how many.
    """

    def __init__(self, size: int, function: Callable[[int], Any]):
        context, port = multiprocessing.get_context("fork"), free_port()
        self.processes, self._ends = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, size, port, function, there), daemon=True
            )
            process.start()
            there.close()
            self._ends.append(here)
            self.processes.append(process)

    def kill(self, ranks: Iterable[int]) -> None:
        """End some at once."""
        for rank in ranks:
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def results(self, *, seconds: float = 120) -> list[Any]:
        """What the function gave on each: its result, its error, or None where the process was killed."""
        found, limit = [], time.monotonic() + seconds
        for rank, end in enumerate(self._ends):
            try:
                if not end.poll(max(limit - time.monotonic(), 0)):
                    raise TimeoutError(f"rank {rank} is still at work")
                found.append(pickle.loads(end.recv_bytes()))
            except EOFError:
                found.append(None)
            except TimeoutError as error:
                found.append(error)
        for process in self.processes:
            process.join(0.1 if None in found else 5)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        return found


def on_ranks(
    size: int, function: Callable[[int], Any], *, seconds: float = 120
) -> list[Any]:
    """What the function gives on each rank, called with its number: its result, its error, or None if it was killed."""
    return Job(size, function).results(seconds=seconds)
