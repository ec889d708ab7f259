"""What a model adds to the outputs of its layers, as a residual stream is: found in a rehearsal, taken up in each call.

Where all that the model does with a layer's output is to add something to it that was there before the layer was
called, what counts is the sum. So the layer can make up for what the other part lacks in the pruned model. Before that
the channels of its output may be scaled and shifted, as by a BatchNorm.
"""

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from torchprune_ext._facts import tensors_in
from torchprune_ext._layers import Layer
from torchprune_ext._ranks import Ranks
from torchprune_ext.compensation.blocks import OTHER_WAY, replaced
from torchprune_ext.compensation.coroutines import Call, Replay, running
from torchprune_ext.compensation.scalings import (
    LEAST,
    Affine,
    Scaling,
    Step,
    Times,
    alike,
    composed,
    largest,
    might_scale,
    probe_of,
    probed,
    scales,
)

Place = tuple[nn.Module, int | str]  # a module, and which of the arguments that it is called with


class Output(NamedTuple):
    """What a layer gives, or what became of it.

    Args:
        layer: the layer.
        reached: when it was.
        probe: a sample of its output, with the same size everywhere.
        steps: by what it was scaled since; None once it went into one more such step.
        affine: what each of these did.
    """

    layer: Layer
    reached: int
    probe: Tensor
    steps: tuple[Step, ...] | None
    affine: tuple[Affine, ...] = ()


class Sum(NamedTuple):
    """A sum that the output of a layer goes into.

    Args:
        places: where what is added passes by.
        steps: by what the output is scaled before.
        probe: as of :class:`Output`.
        affine: as of :class:`Output`.
        dense: the same in the dense model.
    """

    places: Sequence[Place]
    steps: tuple[Step, ...]
    probe: Tensor
    affine: tuple[Affine, ...]
    dense: tuple[Affine, ...] = ()

    def also(self, other: "Sum | None", *, dense: bool = False) -> "Sum":
        """Return what holds in another run too, one of the dense model if ``dense``."""
        if other is None or other.steps != self.steps:
            return self._replace(places=[])
        same = [alike(*pair, self.probe, closely=dense) for pair in zip(self.affine, other.affine, strict=True)]
        places = [place for place in self.places if place in other.places]
        if not dense:
            return self._replace(places=places if all(same) else [])
        theirs = zip(same, self.affine, other.affine, strict=True)  # rounding is no difference
        return self._replace(places=places, dense=tuple(one if equal else each for equal, one, each in theirs))


class Residuals:
    """Where in the model to find what is added to the output of which layer.

    Args:
        model: the model.
        layers: the layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.model, self.layers = model, layers
        self.found: dict[Layer, Sum] | None = None  # in all rehearsals so far
        self.places: dict[Layer, Place] = {}
        self.scalings: dict[Layer, Scaling] = {}  # of the outputs that are scaled before
        self.held: dict[Call, dict[Layer, tuple[Any, object]]] = defaultdict(dict)  # with the block that was passed

    @contextmanager
    def looking(self, *, dense: bool = False) -> Iterator["Watch"]:
        """Find the places while the model runs once; tell what the context gives of each layer's output.

        After several runs, as with batches of several shapes, the places are those that all of them have. With
        ``dense`` it is the dense model that runs, in which modules may scale by something else.
        """
        with Watch(self.model, self.layers) as watch:
            yield watch
        found = watch.found()
        if self.found is not None:
            found = {layer: each.also(found.get(layer), dense=dense) for layer, each in self.found.items()}
        self.found, self.places = found, {layer: each.places[-1] for layer, each in found.items() if each.places}

    def scaled(self) -> dict[Layer, Sum]:
        """Return the sums before which the output is scaled."""
        return {layer: each for layer, each in (self.found or {}).items() if each.steps and each.places}

    def measure(self) -> None:
        """Find out by how much outputs are scaled before something is added, from runs of both models."""
        for layer, each in self.scaled().items():
            scaling = Scaling.of(composed(each.affine), composed(each.dense))
            if scaling.counts.any():
                self.scalings[layer] = scaling
            else:
                del self.places[layer]  # nothing of it gets into the sum

    def scale_of(self, layer: Layer) -> Tensor | None:
        """Return by how much outputs of ``layer`` are scaled, ``(groups, outputs)``; None if they are not."""
        return layer.outputs(self.scalings[layer].scale.abs()[None]).squeeze(1) if layer in self.scalings else None

    def agree(self, ranks: Ranks) -> None:
        """Keep the sums of those layers for which all ranks have one, after the same steps."""
        if ranks.group is None:
            return
        names = {module: name for name, module in self.model.named_modules()}
        told = ranks.of_all(*[self._told(layer, names) for layer in self.layers])
        for layer, codes in zip(self.layers, told.t().tolist(), strict=True):
            if 0 in codes or len(set(codes)) > 1:
                self.places.pop(layer, None)
                self.scalings.pop(layer, None)
            elif layer in self.scalings:  # measured on other outputs, and so rounded in another way
                self.scalings[layer] = self.scalings[layer].of_first(ranks)

    def _told(self, layer: Layer, names: Mapping[Any, str]) -> int:
        """Return a number for the steps before the sum, 0 for none; ``names`` are those of the modules."""
        if layer not in self.places:
            return 0
        steps = [names.get(step, step) for step in (self.found or {})[layer].steps]
        return 1 + crc32(str(steps).encode())

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
    """Follows what the modules of ``model`` are called with and what ``layers`` give, operation by operation."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.listed = {layer.module for layer in layers}
        self.modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
        self.time = 0
        self.calls: Counter[nn.Module] = Counter()
        self.arguments = WeakIdKeyDictionary()  # of each tensor when, as what and in which version it was passed
        self.outputs = WeakIdKeyDictionary()  # of layers, or scaled since: an Output each
        self.sums: dict[Layer, Sum] = {}
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
        alone = len(args) == 1 and not kwargs and type(args[0]) is Tensor and module not in self.listed
        output = self.outputs.get(args[0]) if alone else None
        if output is None or args[0].is_inference() or not might_scale(module, output.layer, args[0]):
            return forward(*args, **kwargs)
        return self._through(module, forward, args[0])

    def gives(self, layer: Layer, y: Tensor) -> None:
        """Follow the output ``y`` of a layer that is reached now."""
        if y.numel():
            self.outputs[y] = Output(layer, self.time, probe_of(y), ())

    def kept(self) -> None:
        """Take note of outputs of layers that are held: in what the model hands out, by a module, in a cache."""
        if {output.layer for output in self.outputs.values()} & self.sums.keys():
            gc.collect()  # what only a cycle holds is not held
        self.others |= {output.layer for output in self.outputs.values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See what an operation does with the layers' outputs, and run it."""
        kwargs = kwargs or {}
        found = [tensor for tensor in tensors_in([args, kwargs]) if tensor in self.outputs]
        times = Times.of(func, args, kwargs) if found else None
        if times is not None:
            y, z = args[0], func(*args, **kwargs)
            return self._scaled(y, times, z, times.affine(self.outputs[y].layer, y))
        for tensor in found:
            self._used(tensor, func, args, kwargs)
        return func(*args, **kwargs)

    def _through(self, module: nn.Module, forward: Any, y: Tensor) -> Any:
        """Call a module with the output of a layer, and see whether it only scales that."""
        output, version = self.outputs.pop(y), y._version  # what is done with it meanwhile is looked at as a whole
        affine = probed(output.layer, forward, y)  # before, so that what the module keeps is of the model's own call
        z = forward(y)
        same = y._version == version
        scaled = bool(same and affine and scales(affine, y, z))
        self.outputs[y] = output
        if scaled and affine:
            return self._scaled(y, module, z, affine)
        if z is not y or not same:
            self.others.add(output.layer)
        return z

    def _scaled(self, y: Tensor, step: Step, z: Tensor, affine: Affine) -> Tensor:
        """Follow ``z``, which a ``step`` made of the output ``y`` of a layer, or of what became of it."""
        output = self.outputs[y]
        if output.steps is None or output.layer in self.sums:
            self.others.add(output.layer)
        else:
            self.outputs[z] = output._replace(steps=(*output.steps, step), affine=(*output.affine, affine))
            self.outputs[y] = output._replace(steps=None)
        return z

    def _used(self, y: Tensor, func: Any, args: Any, kwargs: Any) -> None:
        """Take note of what is added to ``y``, or of another use."""
        layer, reached, probe, steps, affine = self.outputs[y]
        added = func in (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor) and not kwargs
        other: Any = next((term for term in args if term is not y), None) if added else None
        fits = isinstance(other, Tensor) and (other.shape, other.dtype) == (y.shape, y.dtype)
        if not fits or steps is None or layer in self.sums:
            self.others.add(layer)
            return
        passed = self.arguments.get(other, [])  # nothing for inference tensors, which have no version
        places = [place for time, place, version in passed if time <= reached and version == other._version]
        if steps and largest(y) <= LEAST * largest(other):
            places = []  # what it gives is too little to make up for anything
        self.sums[layer] = Sum(places, steps, probe, affine)
        if func is torch.ops.aten.add_.Tensor and args[0] is y:
            del self.outputs[y]  # which is the sum from now on

    def found(self) -> dict[Layer, Sum]:
        """Return the sums, with the places before each layer in order, at modules that are called once."""
        return {
            layer: each._replace(places=[place for place in each.places if self.calls[place[0]] == 1])
            for layer, each in self.sums.items()
            if layer not in self.others
        }
