"""Threads that take turns: what runs in each can stop in the middle and go on when all others have come as far."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch


class Cancelled(BaseException):
    """Ends a thread after another one has failed."""


class Turns:
    """Threads of which one runs at a time, in a fixed order."""

    def __init__(self, number: int) -> None:
        self.mine = [threading.Semaphore(0) for _ in range(number)]
        self.error: BaseException | None = None

    def run(self, work: Callable[[int], None], device: str) -> None:
        """Call ``work(number)`` in each thread, in the caller's context with its autocast on ``device``; wait for all.

        Raises:
            BaseException: what the first one raised.
        """
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        default = torch.get_default_device()

        def one(number: int) -> None:
            self.mine[number].acquire()
            try:
                if self.error is None:
                    place = nullcontext() if default.type == "cpu" else default
                    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, dtype, enabled), place:
                        work(number)
            except BaseException as error:
                self.error = self.error or error
            finally:
                self._next(number)

        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(one, number), daemon=True)
            for number in range(len(self.mine))
        ]
        try:
            for thread in threads:
                thread.start()
            self.mine[0].release()
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C, or one thread too many
            self.error = error
            for semaphore in self.mine:
                semaphore.release()
            _end(threads)
        if self.error is not None:
            raise self.error

    def pause(self, number: int) -> None:
        """Let the others have their turns."""
        self._next(number)
        self.mine[number].acquire()
        if self.error is not None:
            raise Cancelled

    def _next(self, number: int) -> None:
        self.mine[(number + 1) % len(self.mine)].release()


def _end(threads: Sequence[threading.Thread]) -> None:
    """Wait for the end of all ``threads`` that were started, however often Ctrl-C is pressed."""
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        except KeyboardInterrupt:
            continue
