"""What modules keep on themselves while a batch goes through, for batches that take turns in one model.

A model may put something aside in one layer and take it up in a later one: a tensor as an attribute or in a buffer, a
list of skip connections, a cache. With calls that stop in the middle, each has to find its own there.
"""

from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from torchprune_ext._runs import Run
from torchprune_ext.compensation.coroutines import Call

GONE = object()
MEMBERS = ("_parameters", "_buffers", "_modules")
OPAQUE = (Tensor, nn.Module, type, ModuleType, FunctionType, MethodType, Enum, torch.device, torch.dtype)
DEPTH = 2  # of objects within objects, such as a cache and its layers
MOST = 10_000  # entries of a list or a dictionary; a larger one is data
State = tuple[dict[tuple[int, str], Any], dict[int, list[Any]], dict[int, Tensor]]


class Attributes:
    """What modules of an open model keep on themselves, to be swapped between calls.

    Watched are attributes and buffers, what is in the lists, dictionaries and objects that the attributes hold from the
    start, and tensors that are written into.

    Args:
        run: the open model, before any call.
        but: modules whose buffers are not watched, as whoever runs the calls sets them.
    """

    def __init__(self, run: Run, but: Collection[nn.Module] = ()) -> None:
        tables: dict[int, dict[Any, Any]] = {}
        lists: dict[int, Any] = {}
        for module in run.model.modules():
            for table in (vars(module), {} if module in but else module._buffers):
                tables[id(table)] = table
            for key, value in vars(module).items():
                if key not in MEMBERS and not key.endswith("_hooks") and key != "forward":
                    _collect(value, tables, lists)
        self.tables, self.lists = list(tables.values()), list(lists.values())
        self.tensors = [] if run.written is None else [pair for pair in run.written.kept.values() if _counts(pair[0])]
        self.before = [dict(table) for table in self.tables]
        self.listed = [list(each) for each in self.lists]
        self.versions = [tensor._version for tensor, _ in self.tensors]
        self.changing: set[tuple[int, Any]] = set()  # keys of tables
        self.moving: set[int] = set()  # lists
        self.written: set[int] = set()  # tensors
        self.held: dict[Call, State] = {}

    def look(self) -> None:
        """See what is not as it was before all calls; only such is swapped."""
        for place, (table, before) in enumerate(zip(self.tables, self.before, strict=True)):
            if len(table) < len(before):
                self.changing |= {(place, key) for key in before.keys() - table.keys() if key != "forward"}
            self.changing |= {
                (place, key) for key, value in table.items() if value is not before.get(key, GONE) and key != "forward"
            }
        for place, (each, old) in enumerate(zip(self.lists, self.listed, strict=True)):
            if len(each) != len(old) or any(a is not b for a, b in zip(each, old, strict=True)):
                self.moving.add(place)
        for place, ((tensor, _), version) in enumerate(zip(self.tensors, self.versions, strict=True)):
            if tensor._version != version:
                self.written.add(place)

    def now(self) -> State:
        """Return what is kept now."""
        return (
            {(place, key): self.tables[place].get(key, GONE) for place, key in self.changing},
            {place: list(self.lists[place]) for place in self.moving},
            {place: self.tensors[place][0].detach().clone() for place in self.written},
        )

    def put(self, state: State | None = None) -> None:
        """Let the modules keep what they kept at ``state``, by default before all calls."""
        keys, lists, tensors = ({}, {}, {}) if state is None else state
        for place, key in self.changing:
            value = keys.get((place, key), self.before[place].get(key, GONE))
            if value is GONE:
                self.tables[place].pop(key, None)
            else:
                self.tables[place][key] = value
        for place in self.moving:
            each = self.lists[place]
            each.clear()
            (each.update if isinstance(each, set) else each.extend)(lists.get(place, self.listed[place]))
        with torch.no_grad():
            for place in self.written:
                tensor, value = self.tensors[place]
                value = tensors.get(place, value)
                if tensor.shape != value.shape:
                    tensor.resize_(value.shape)
                tensor.copy_(value)

    @contextmanager
    def of(self, call: Call, *, watch: bool = True) -> Iterator[None]:
        """Let the modules keep what they kept when ``call`` stopped, in a body that lets it go on.

        Args:
            call: the call.
            watch: look again at what changes; else that is known from a rehearsal.
        """
        self.put(self.held.get(call))
        yield
        if watch:
            self.look()
        if not call.restarts:
            self.held[call] = self.now()


def _collect(value: Any, tables: dict[int, dict[Any, Any]], lists: dict[int, Any], depth: int = DEPTH) -> None:
    """Add the dictionaries, and the lists and their like, that ``value`` is or holds."""
    if id(value) in tables or id(value) in lists or isinstance(value, OPAQUE):
        return
    inner: Any = ()
    if isinstance(value, (dict, list, deque, set, tuple, frozenset)):
        if len(value) > MOST:
            return
        if isinstance(value, dict):
            tables[id(value)] = value
        elif not isinstance(value, (tuple, frozenset)):
            lists[id(value)] = value
        inner = list(value.values() if isinstance(value, dict) else value)
    elif depth:
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        depth, inner = depth - 1, [own]
    for each in inner:
        _collect(each, tables, lists, depth)


def _counts(tensor: Tensor) -> bool:
    """Return whether ``tensor`` counts how often it is written into."""
    return not tensor.is_inference()
