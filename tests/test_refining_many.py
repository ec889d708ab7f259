"""Refining with more batches than wait in threads gives what few give, bit for bit."""

import copy
import threading
import warnings

import pytest
import torch
from snapshots import Snapshot
from test_refining import QUIET, Block, Stack, adam, data, made
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.compensation import coroutines

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Keywords(Stack):
    """Blocks get nothing but keywords, the first of which is no tensor."""

    class Block(Block):
        def forward(self, *, scale, x):
            return super().forward(x * scale)

    def __init__(self, layers):
        super().__init__(layers, self.Block)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(scale=0.5, x=x)[0]
        return self.head(x)


class Trees(Stack):
    """Blocks get a tuple of a number and a dictionary, and give one."""

    class Block(Block):
        def forward(self, given):
            depth, state = given
            return depth + 1, {"x": super().forward(state["x"])[0] + depth, "ids": state["ids"]}

    def __init__(self, layers):
        super().__init__(layers, self.Block)

    def forward(self, x):
        given = 0, {"x": self.stem(x), "ids": torch.arange(x.shape[1])}
        for layer in self.layers:
            given = layer(given)
        return self.head(given[1]["x"])


class Aside(Stack):
    """The model leaves something on itself that a block reads, in place of an argument."""

    class Block(Block):
        def forward(self, x, owner):
            return super().forward(x + owner[0].kept)

    def __init__(self, layers):
        super().__init__(layers, self.Block)

    def forward(self, x):
        x = self.stem(x)
        for place, layer in enumerate(self.layers):
            self.kept = x.mean(1, keepdim=True) + place
            x = layer(x, [self])[0]
        return self.head(x)


class Noted(Stack):
    """The first block leaves something in an object that the last one reads."""

    class Notes:
        kept = None

    class Block(Block):
        def __init__(self, notes):
            super().__init__()
            self.notes = notes

        def forward(self, x, place):
            if self.notes.kept is None:
                self.notes.kept = x.mean(1, keepdim=True)
            return super().forward(x if place == 1 else x + self.notes.kept)

    def __init__(self, layers):
        notes = self.Notes()
        super().__init__(layers, lambda: self.Block(notes))
        self.notes = notes

    def forward(self, x):
        self.notes.kept = None
        x = self.stem(x)
        for place, layer in enumerate(self.layers):
            x = layer(x, place)[0]
        return self.head(x)


class Buffered(Stack):
    """A block reads a buffer that the model writes into."""

    class Block(Block):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(6))

        def forward(self, x):
            return super().forward(x + self.shift)

    def __init__(self, layers):
        super().__init__(layers, self.Block)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            layer.shift.copy_(x.mean((0, 1)))
            x = layer(x)[0]
        return self.head(x)


class Skipping(Stack):
    def forward(self, x):
        first = x = self.layers[0](self.stem(x))[0]
        for layer in self.layers[1:]:
            x = layer(x + first)[0]
        return self.head(x)


KINDS = [Stack, Keywords, Trees, Aside, Noted, Buffered, Skipping]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_begin_anew_give_the_same(kind, monkeypatch):
    results = []
    for window in (100, 2, 0):
        monkeypatch.setattr(coroutines, "WINDOW", window)
        model, dense, _ = made(kind, layers=3, seed=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*run from the start")
            done = tpe.refine(model, data(7), dense=dense, epochs=2, optimizer=adam(1e-2), held_out=0.3, **QUIET)
        results.append((str(done), done, model.state_dict()))
    assert results[0][1].model.best
    for told, done, state in results[1:]:
        assert told == results[0][0]
        assert done == results[0][1]
        for name, value in state.items():
            assert torch.equal(value, results[0][2][name]), name


def test_threads_do_not_grow_with_the_batches():
    model, dense, _ = made(layers=2)
    most = []
    model.layers[1].up.register_forward_hook(lambda *_: most.append(threading.active_count()))
    before = threading.active_count()
    tpe.refine(model, data(200, 2, (2, 5)), dense=dense, epochs=1, optimizer=adam(1e-3), **QUIET)
    assert before < max(most) <= before + 2 * coroutines.WINDOW


def test_blocks_are_not_run_again_for_each_block_behind_them(monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", 0)
    seen = {}
    for layers in (2, 6):
        model, dense, _ = made(layers=layers)
        calls = []
        for layer in model.layers:
            layer.up.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        tpe.refine(model, data(8), dense=dense, epochs=1, optimizer=adam(1e-3), **QUIET)
        seen[layers] = len(calls)
    assert seen[6] < 3.5 * seen[2]


def test_models_that_are_not_of_blocks_are_told(monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", 2)

    class Kept(Stack):
        class Block(Block):
            def forward(self, x, keep=None):
                self.left = x
                return super().forward(x)

        def __init__(self, layers):
            super().__init__(layers, self.Block)

    model, dense, _ = made(Kept, layers=2)
    with pytest.warns(UserWarning, match="4 of the 6 batches are run from the start.* each of the 2"):
        tpe.refine(model, data(), dense=dense, epochs=1, **QUIET)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_a_later_batch_leaves_no_trace(error, place, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", 1)

    class Fails(Stack):
        def forward(self, x):
            self.stem.noted = x.shape
            odd, x = x.shape[1] == 3, self.stem(x)
            for number, layer in enumerate(self.layers):
                if odd and number == place:
                    raise error
                x = layer(x)[0]
            return self.head(x)

    model, dense, _ = made(Fails, layers=2)
    before = Snapshot(model)
    with pytest.raises(error):
        tpe.refine(model, [*data(5), *data(1, 8, (3, 5))], dense=dense, epochs=1, **QUIET)
    assert not before.differences()


@pytest.mark.parametrize("window", [0, 100])
def test_batches_that_take_other_ways(window, monkeypatch):
    monkeypatch.setattr(coroutines, "WINDOW", window)

    class Branches(Stack):
        def forward(self, x):
            x = self.stem(x)
            for layer in self.layers if x.shape[0] > 2 else self.layers[:1]:
                x = layer(x)[0]
            return self.head(x)

    model, dense, _ = made(Branches, layers=2)
    before = Snapshot(model)
    with pytest.raises(ValueError, match="different ways"):
        tpe.refine(model, [*data(3), *data(3, size=2)], dense=dense, epochs=1, **QUIET)
    assert not before.differences()


def test_autocast_reaches_batches_that_begin_anew(monkeypatch):
    results = []
    for window in (100, 0):
        monkeypatch.setattr(coroutines, "WINDOW", window)
        model, dense, _ = made(layers=2, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            done = tpe.refine(model, data(), dense=dense, epochs=2, optimizer=adam(1e-2), **QUIET)
        results.append((done, copy.deepcopy(model.state_dict())))
    assert results[0][0] == results[1][0]
    assert results[0][0].model.best
    assert all(map(torch.equal, results[0][1].values(), results[1][1].values()))


def test_a_model_of_one_linear_block_is_one_of_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    dense = copy.deepcopy(model)
    tpe.global_unstructured(tpe.prunable_parameters(model), target_sparsity=0.5)
    done = tpe.refine(model, data(40), dense=dense, blocks=["0", "2"], epochs=2, optimizer=adam(1e-2), **QUIET)
    assert [row.name for row in done.blocks] == ["0", "2"]
    assert done.model.best


@pytest.mark.filterwarnings("ignore:fewer rows of data")
def test_nan_in_samples_that_do_not_count_does_not_hide_the_blocks(monkeypatch):
    """Else these batches would be run from the start of the model, with a warning, which is an error here."""
    states = []
    for window in (100, 0):
        monkeypatch.setattr(coroutines, "WINDOW", window)
        model, dense, params = made(layers=2)
        batches = data(3)
        for x in batches:
            x[0] = float("nan")
        tpe.compensate(model, batches, params, dense=dense, sample_mask=lambda x: torch.arange(len(x)) > 0, **QUIET)
        states.append(model.state_dict())
    assert all(map(torch.equal, states[0].values(), states[1].values()))
