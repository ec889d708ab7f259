"""Calls that stop in the middle, hand something out and go on later, however deep in other people's code they are.

A pass over the data has to stop inside of a model's forward, at each layer, with all batches there before any goes on.
The usual ways do not serve any module: running block after block needs to know the blocks and what goes between them,
running the model up to a layer again for each layer takes time quadratic in its depth, and hooks cannot suspend. Python
suspends a frame only from within (generators), and what lies between is other people's code; so a call gets a stack of
its own, which in CPython without extensions is a thread. Only one runs at a time, so nothing needs a lock.

What such a call costs: a thread (its stack is reserved, not resident), a pool of threads where it calls OpenMP,
and what its forward holds where it stands. Dozens of them are nothing, thousands are too many. So all beyond the first
``WINDOW`` do run again for each layer, as :class:`Replay`, and ``blocks.py`` makes that linear where it can.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

WINDOW = 32  # batches that wait in threads
_here = threading.local()


class Call:
    """A call that :meth:`resume` lets run until it hands something out.

    Args:
        work: what to call, in the context of the caller: its context variables, default device and autocast.
        device: type of the device whose autocast counts.
    """

    restarts = False  # whether each resume begins anew
    inside: object = None  # the block that runs, of those that a call that begins anew skips once it has come out

    def __init__(self, work: Callable[[], object], device: str) -> None:
        self.work, self.device = work, device
        self.autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # torch.get_default_device() misses `with torch.device(...)` on torch 2.4
        default = torch.empty(0, device=None).device
        self.default = nullcontext() if default.type == "cpu" else default
        self.context = contextvars.copy_context()

    def resume(self) -> Any:
        """Let the call go on, and return what it hands out next; None at its end.

        Raises:
            BaseException: what the call raised.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the call where it is."""

    def pause(self, key: object, value: object, *, known: bool) -> None:
        """Let :meth:`resume` return ``key`` and ``value``."""
        raise NotImplementedError

    def _work(self) -> None:
        """Do the work."""
        before, _here.call = running(), self
        try:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(self.device, *self.autocast),
                self.default,
            ):
                self.work()
        finally:
            _here.call = before


class Coroutine(Call):
    """A call that runs in a thread of its own, and only while :meth:`resume` waits for it.

    Python's own generators stop only in the function itself; this one stops wherever :func:`hand_out` is called.
    """

    def __init__(self, work: Callable[[], object], device: str) -> None:
        super().__init__(work, device)
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.value: Any = None
        self.error: BaseException | None = None
        self.closing = False
        self.thread = threading.Thread(target=self.context.run, args=(self._run,), daemon=True)

    def resume(self) -> Any:
        """Let the call go on, and return what it hands out next; None at its end."""
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

    def pause(self, key: object, value: object, *, known: bool) -> None:
        """Let :meth:`resume` return ``key`` and ``value``, and wait for the next."""
        self.value = key, value
        self.back.release()
        self.go.acquire()
        if self.closing:
            raise _Closed

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.value = None
            self.back.release()


class Replay(Call):
    """A call that begins anew at each :meth:`resume` and is broken off where it hands out what is not yet known.

    It costs no thread, and holds nothing in between but what blocks have put into ``outputs``.
    """

    restarts = True

    def __init__(self, work: Callable[[], object], device: str) -> None:
        super().__init__(work, device)
        self.met: set[object] = set()
        self.entered: set[object] = set()
        self.outputs: dict[object, Any] = {}

    def resume(self) -> Any:
        """Run the call from its start, and return what it hands out that is not known; None at its end."""
        self.met.clear()
        self.entered.clear()
        self.inside = None
        try:
            self.context.copy().run(self._work)
        except _Stopped as stopped:
            return stopped.value
        return None

    def close(self) -> None:
        """Forget what blocks have put into ``outputs``."""
        for output in self.outputs.values():
            output.forget()
        self.outputs.clear()

    def pause(self, key: object, value: object, *, known: bool) -> None:
        """Go on if ``key`` is known, and met for the first time; else break off."""
        if not known or key in self.met:
            raise _Stopped((key, value))
        self.met.add(key)


class _Closed(BaseException):
    """Ends a call in the middle."""


class _Stopped(BaseException):
    """Breaks a call off where it hands out ``value``."""

    def __init__(self, value: object) -> None:
        self.value = value


def running() -> Call | None:
    """Return the call that runs, if this is inside of one."""
    call: Call | None = getattr(_here, "call", None)
    return call


def hand_out(key: object, value: object, *, known: bool) -> None:
    """Stop the running call and let its :meth:`~Call.resume` return ``(key, value)``.

    Args:
        key: where the call is.
        value: what to hand out there.
        known: whether a call that begins anew shall go on here, the first time that it comes by.
    """
    call = running()
    if call is not None:
        call.pause(key, value, known=known)


def calls_of(
    works: Sequence[Callable[[], object]], device: str, streams: int = 1, window: int | None = None
) -> list[list[Call]]:
    """Return calls for each of ``works``, so many of each; no more than ``window`` works are in threads."""
    window = WINDOW if window is None else window
    kinds = [Coroutine if number < window else Replay for number in range(len(works))]
    return [[kind(work, device) for _ in range(streams)] for kind, work in zip(kinds, works, strict=True)]
