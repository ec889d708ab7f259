"""What a model adds to the outputs of its layers, as a residual stream is: found in a rehearsal, taken up in each call.

Where all that the model does with a layer's output is to add something to it that was there before the layer was
called, what counts is the sum. So the layer can make up for what the other part lacks in the pruned model.
"""

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from torchprune_ext._facts import tensors_in
from torchprune_ext._layers import Layer
from torchprune_ext._ranks import Ranks
from torchprune_ext.compensation.blocks import OTHER_WAY, replaced
from torchprune_ext.compensation.coroutines import Call, Replay, running

Place = tuple[nn.Module, int | str]  # a module, and which of the arguments that it is called with


class Residuals:
    """Where in the model to find what is added to the output of which layer.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[Layer, list[Place]] | None = None  # in all rehearsals so far
        self.places: dict[Layer, Place] = {}
        self.held: dict[Call, dict[Layer, tuple[Any, object]]] = defaultdict(dict)  # with the block that was passed

    @contextmanager
    def looking(self) -> Iterator["Watch"]:
        """Find the places while the model runs once; tell what the context gives of each layer's output.

        After several runs, as with batches of several shapes, the places are those that all of them have.
        """
        with Watch(self.model) as watch:
            yield watch
        found = watch.places()
        if self.found is not None:
            found = {layer: [p for p in found.get(layer, ()) if p in places] for layer, places in self.found.items()}
        self.found, self.places = found, {layer: places[-1] for layer, places in found.items() if places}

    def agree(self, ranks: Ranks, layers: Sequence[Layer]) -> None:
        """Keep the places of those ``layers`` for which all ranks have one."""
        for layer, count in zip(layers, ranks.totals(*[layer in self.places for layer in layers]), strict=True):
            if count < ranks.size:
                self.places.pop(layer, None)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Take up what calls of the model pass by the places."""
        layers: dict[nn.Module, list[tuple[Layer, int | str]]] = defaultdict(list)
        for layer, (module, key) in self.places.items():
            layers[module].append((layer, key))

        def enter(module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
            call = running()
            if call is not None:
                given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}  # type: ignore[dict-item]
                for layer, key in layers[module]:
                    if layer in self.held[call]:
                        raise ValueError(OTHER_WAY)  # the module was called once in the rehearsal
                    self.held[call][layer] = given.get(key), call.inside
            return forward(*args, **kwargs)

        with replaced(layers, enter):
            yield

    def of(self, layer: Layer) -> Tensor | None:
        """Hand out what is added to the output of ``layer`` in the call that runs; None if nothing is, or was seen."""
        call = running()
        found, _ = (None, None) if call is None else self.held[call].pop(layer, (None, None))
        return found.detach() if isinstance(found, Tensor) else None

    def forget(self, call: Call) -> None:
        """Let go what ``call``, if it begins anew, passes by again: all outside of blocks that it has come out of."""
        if isinstance(call, Replay):
            kept = {layer: pair for layer, pair in self.held[call].items() if pair[1] in call.outputs}
            self.held[call] = kept


class Watch(TorchDispatchMode):
    """Follows what the modules of ``model`` are called with and what layers give, operation by operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self.time = 0
        self.calls: Counter[nn.Module] = Counter()
        self.arguments = WeakIdKeyDictionary()  # of each tensor when, as what and in which version it was passed
        self.outputs = WeakIdKeyDictionary()  # of layers: which layer, and when it was reached
        self.sums: dict[Layer, list[Place]] = {}
        self.others: set[Layer] = set()  # whose output is used in another way

    def calls_seen(self) -> AbstractContextManager[None]:
        """See all calls of modules, those too whose forward has been replaced."""
        return replaced(self.modules, self.enter)

    def enter(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Write down what ``module`` is called with, and call it."""
        self.time += 1
        self.calls[module] += 1
        for key, value in [*enumerate(args), *kwargs.items()]:
            if type(value) is Tensor and not value.is_inference():
                passed = self.arguments.setdefault(value, [])
                passed.append((self.time, (module, key), value._version))
        return forward(*args, **kwargs)

    def gives(self, layer: Layer, y: Tensor) -> None:
        """Follow the output ``y`` of a layer that is reached now."""
        self.outputs[y] = layer, self.time

    def kept(self) -> None:
        """Take note of outputs of layers that are held: in what the model hands out, by a module, in a cache."""
        if {layer for layer, _ in self.outputs.values()} & self.sums.keys():
            gc.collect()  # what only a cycle holds is not held
        self.others |= {layer for layer, _ in self.outputs.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See what an operation does with the layers' outputs, and run it."""
        for tensor in tensors_in([args, kwargs or {}]):
            if tensor in self.outputs:
                layer, reached = self.outputs[tensor]
                self._used(layer, reached, tensor, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _used(self, layer: Layer, reached: int, y: Tensor, func: Any, args: Any, kwargs: Any) -> None:
        """Take note of what is added to ``y``, or of another use."""
        added = func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs
        other = next((term for term in args if term is not y), None) if added else None
        if not isinstance(other, Tensor) or other.shape != y.shape or other.dtype != y.dtype or layer in self.sums:
            self.others.add(layer)
            return
        passed = self.arguments.get(other, [])
        self.sums[layer] = [place for time, place, version in passed if time <= reached and version == other._version]
        if func is torch.ops.aten.add_.Tensor and args[0] is y:
            del self.outputs[y]  # which is the sum from now on

    def places(self) -> dict[Layer, list[Place]]:
        """Return where what is added passes by before each layer, in order, at modules that are called once."""
        return {
            layer: [place for place in places if self.calls[place[0]] == 1]
            for layer, places in self.sums.items()
            if layer not in self.others
        }
