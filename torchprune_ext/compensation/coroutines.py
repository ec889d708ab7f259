"""Calls that stop in the middle, hand something out and go on later, however deep in other people's code they are.

A pass over the data has to stop inside of a model's forward, at each layer, with all batches there before any goes on.
The usual ways do not serve any module: running block after block needs to know the blocks and what goes between them,
running the model up to a layer again for each layer takes time quadratic in its depth, and hooks cannot suspend. Python
suspends a frame only from within (generators), and what lies between is other people's code; so a call gets a stack of
its own, which in CPython without extensions is a thread. Only one runs at a time, so nothing needs a lock.

What a call costs: a thread (its stack is reserved, not resident), a pool of threads where it calls OpenMP,
and what its forward holds where it stands. Dozens of them are nothing, thousands are too many.
"""

import contextvars
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

_here = threading.local()


class Coroutine:
    """A call that runs in a thread of its own, and only while :meth:`resume` waits for it.

    Python's own generators stop only in the function itself; this one stops wherever :func:`hand_out` is called.

    Args:
        work: what to call, in the context of the caller: its context variables, default device and autocast.
        device: type of the device whose autocast counts.
    """

    def __init__(self, work: Callable[[], object], device: str) -> None:
        self.work, self.device = work, device
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.value: Any = None
        self.error: BaseException | None = None
        self.closing = False
        self.autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        default = torch.get_default_device()
        self.default = nullcontext() if default.type == "cpu" else default
        self.thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)

    def resume(self) -> Any:
        """Let the call go on, and return what it hands out next; None at its end.

        Raises:
            BaseException: what the call raised.
        """
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error
        return self.value

    def close(self) -> None:
        """End the call where it is, and wait for that, however often Ctrl-C is pressed meanwhile."""
        self.closing = True
        while self.thread.is_alive():
            try:
                self.go.release()
                self.thread.join()
            except KeyboardInterrupt:
                continue

    def _run(self) -> None:
        _here.coroutine = self
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(self.device, *self.autocast),
                self.default,
            ):
                self.work()
        except BaseException as error:
            self.error = error
        finally:
            self.value = None
            self.back.release()


class _Closed(BaseException):
    """Ends a call in the middle."""


def hand_out(value: object) -> None:
    """Stop the running :class:`Coroutine` and let its :meth:`~Coroutine.resume` return ``value``, not None."""
    coroutine: Coroutine = _here.coroutine
    coroutine.value = value
    coroutine.back.release()
    coroutine.go.acquire()
    if coroutine.closing:
        raise _Closed
