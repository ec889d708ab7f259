"""A picture of everything that a module is, to tell whether a rejected call has left a trace."""

import torch
from torch import nn
from torch.nn.utils import prune


def _picture(value, path, found):
    """Note ``value`` itself (which keeps it alive) and its content under ``path``; go on with what it holds."""
    content, inside = None, {}
    if torch.is_tensor(value):
        content = (tuple(value.shape), value.stride(), value.dtype, value.requires_grad, _bits(value))
        inside = {"grad": value.grad} if value.is_leaf else {}
    elif isinstance(value, dict):
        content, inside = list(value), value
    elif isinstance(value, list | tuple):
        content, inside = len(value), dict(enumerate(value))
    elif isinstance(value, prune.BasePruningMethod) or (isinstance(value, nn.Module) and path.count(".") < 1):
        content, inside = type(value), vars(value)
    found[path] = (value, content)
    for key, item in inside.items():
        _picture(item, f"{path}.{key}", found)
    return found


def _bits(tensor):
    """Return the values of a tensor, bit for bit, as they are now."""
    if tensor.is_meta:
        return b""
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def _shown(content):
    """Return what a tensor is with its values as numbers."""
    if not (isinstance(content, tuple) and content and isinstance(content[-1], bytes)):
        return content
    *rest, dtype, requires_grad, bits = content
    values = torch.frombuffer(bytearray(bits), dtype=dtype).tolist() if bits else []
    return (*rest, dtype, requires_grad, values)


def _same(old, new):
    plain = (int, float, str, tuple, torch.dtype)
    return old is new or (type(old) is type(new) and isinstance(old, plain))  # a tuple's items have rows of their own


class Snapshot:
    """Everything the modules hold, by identity and by content; ``differences()`` says what has changed since."""

    def __init__(self, *modules):
        self.modules = [child for module in modules for child in module.modules()]
        self.before = self._take()

    def _take(self):
        found = {}
        for i, module in enumerate(self.modules):
            _picture(module, f"{type(module).__name__}[{i}]", found)
        return found

    def differences(self):
        """Return one line for each thing that is no longer what it was."""
        now, lines = self._take(), []
        for path in {**self.before, **now}:
            if path not in self.before or path not in now:
                lines.append(f"{path}: {'gone' if path in self.before else 'new'}")
                continue
            (old, had), (new, has) = self.before[path], now[path]
            if not _same(old, new):
                lines.append(f"{path}: another object")
            elif had != has or (isinstance(old, int | float | str) and repr(old) != repr(new)):
                lines.append(f"{path}: {_shown(had) or old!r} became {_shown(has) or new!r}")
        return lines
