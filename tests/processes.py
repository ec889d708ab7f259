"""Processes for tests of what several of them do together; they stay for all tests, since each has to import torch."""

import contextlib
import multiprocessing
import socket
import traceback
from multiprocessing.connection import wait

import pytest
import torch

GRACE = 1  # seconds in which others may say what they failed with, after the first


def _work(rank, pipe):
    """Make the calls that are sent, one after the other, until the other end is closed."""
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                function(rank, *args)
            except BaseException:
                pipe.send(traceback.format_exc())
            else:
                pipe.send(None)


class Processes:
    """Calls functions in several processes, as ``torch.multiprocessing.spawn`` does, but starts each process once.

    A function leaves its process as it was. After an error all processes are ended, and the next call starts others.
    """

    def __init__(self):
        self.started = []

    def spawn(self, function, args, nprocs):
        """Call ``function(rank, *args)`` in each of ``nprocs`` processes; raise ``AssertionError`` if one fails."""
        while len(self.started) < nprocs:
            self._start()
        failed = {}
        try:
            pipes = [pipe for _, pipe in self.started[:nprocs]]
            for pipe in pipes:
                pipe.send((function, args))
            waiting = set(pipes)
            while waiting and (ready := wait(waiting, GRACE if failed else None)):
                for pipe in ready:
                    waiting.remove(pipe)
                    try:
                        error = pipe.recv()
                    except (EOFError, ConnectionError):
                        error = "the process has died"
                    if error is not None:
                        failed[pipes.index(pipe)] = error
        except BaseException:
            self.stop()
            raise
        if failed:
            self.stop()
            raise AssertionError("\n\n".join(f"rank {rank} of {nprocs}: {failed[rank]}" for rank in sorted(failed)))

    def trained(self, function, path):
        """Call ``function(rank, port, path)`` in two processes, and return what each has saved as ``rank<n>.pt``."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.spawn(function, (port, path), 2)
        return [torch.load(path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]

    def _start(self):
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            process = context.Process(target=_work, args=(len(self.started), there), daemon=True)
            process.start()
        there.close()
        self.started.append((process, here))

    def stop(self):
        """End all processes."""
        for process, pipe in self.started:
            pipe.close()
            process.kill()  # also if it waits in C, or handles signals in its own way
        for process, _ in self.started:
            process.join()
        self.started = []
