"""What a module is, so that it can be put back: its class, attributes, tables, and the data of its parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Table = dict[Any, Any] | list[Any] | set[Any]
Contents = tuple[type[nn.Module], dict[str, Any], list[tuple[Table, Table]], list[tuple[nn.Parameter, Tensor]]]


@contextmanager
def all_or_nothing(modules: Iterable[nn.Module]) -> Iterator[None]:
    """On any exception, Ctrl-C too, put ``modules`` back to what they were: tensors, their order, buffers, hooks.

    Does not restore what is written into a tensor, only which tensors there are and what ``data`` they point to.
    """
    before = [(module, contents_of(module)) for module in dict.fromkeys(modules)]
    try:
        yield
    except BaseException:
        for module, contents in before:
            restore(module, contents)
        raise


def restore(module: nn.Module, contents: Contents) -> None:
    """Make ``module`` what it was when ``contents`` were taken from it."""
    kind, attributes, tables, data = contents
    if type(module) is not kind:
        module.__class__ = kind
    _refill(vars(module), attributes)
    for table, entries in tables:
        _refill(table, entries)
    for parameter, values in data:
        parameter.data = values


def contents_of(module: nn.Module, *, data: bool = True) -> Contents:
    """Return class and attributes of ``module``, copies of its tables, and with ``data`` that of its parameters."""
    tables = [value for value in vars(module).values() if isinstance(value, (dict, list, set))]
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    return (
        type(module),
        dict(vars(module)),
        [(table, table.copy()) for table in tables],
        [(p, p.data) for p in parameters] if data else [],
    )


def _refill(table: Table, contents: Table) -> None:
    """Give ``table`` back its ``contents`` and their order."""
    table.clear()
    if isinstance(table, list):
        table.extend(contents)
    else:
        table.update(contents)
