"""Files of compacted models that lie about modules: refused by name, and the model is what it was."""

import json

import pytest
import torch
from test_compact_files import refused
from torch import nn

import torchprune_ext as tpe

KEY = "torchprune_ext_modules"


class Net(nn.Module):
    def __init__(self, width=4, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 3, bias=bias)
        self.linear = nn.Linear(width, 3)
        self.again = self.linear
        self.register_buffer("steps", torch.arange(width))


def frozen(bias=True):
    return Net(bias=bias).requires_grad_(False)


@pytest.fixture
def raw(tmp_path):
    tpe.save_compact(Net(2), tmp_path / "f")
    return tmp_path / "f"


def rewrite(path, edit):
    """Apply an edit to the header of a file, in which the metadata are tables, and write it; data stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    about = {key: json.loads(text) for key, text in header["__metadata__"].items() if key != "format"}
    edit(header, about)
    header["__metadata__"] = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw[8 + length :])


def put(place, value):
    """Return an edit that sets what stands at a path in what the file says of the modules."""

    def edit(header, about):
        table = about[KEY]
        for key in place[:-1]:
            table = table[key]
        table[place[-1]] = value

    return edit


def without(place):
    def edit(header, about):
        table = about[KEY]
        for key in place[:-1]:
            table = table[key]
        del table[place[-1]]

    return edit


def shaped(name, shape, dtype="F32"):
    """Return an edit that changes shape and dtype of a tensor that has as many bytes."""

    def edit(header, about):
        header[name]["shape"], header[name]["dtype"] = shape, dtype

    return edit


CONV, LINEAR = ("modules", "conv"), ("modules", "linear")
EDITS = {
    "version of the future": (
        lambda h, about: about.update({KEY: {"version": 2, "layers": {}}}),
        "has version 2, this library reads 1. Update it",
    ),
    "version of the past": (put(("version",), 0), "do not hold just version and modules"),
    "version that is not a number": (put(("version",), True), "do not hold just version and modules"),
    "no version": (without(("version",)), "do not hold just version and modules"),
    "more than that": (put(("more",), 1), "do not hold just version and modules"),
    "a list": (lambda h, about: about.update({KEY: [1]}), "do not hold just version and modules"),
    "not JSON": (lambda h, about: about.update({KEY: "{"}), "the metadata torchprune_ext_modules is not valid"),
    "a key twice": (lambda h, about: about.update({KEY: '{"version":1,"version":1}'}), "occurs twice"),
    "modules that are a list": (put(("modules",), []), "are not a table"),
    "a module that is a number": (put(CONV, 3), "module 'conv': what the metadata"),
    "a module without a class": (without((*CONV, "class")), "module 'conv': what the metadata"),
    "a class that is a list": (put((*CONV, "class"), ["Conv2d"]), "module 'conv': what the metadata"),
    "another class": (put((*CONV, "class"), "Linear"), "'conv' is a 'Linear' in the file and a Conv2d"),
    "a long class": (put((*CONV, "class"), "x" * 10**6), "'conv' is a 'xxx.*characters"),
    "numbers that are a list": (put((*CONV, "numbers"), [1]), "module 'conv': what the metadata"),
    "a number that is a string": (put((*CONV, "numbers", "groups"), "1"), "module 'conv': what the metadata"),
    "a number that is True": (put((*CONV, "numbers", "groups"), True), "module 'conv': what the metadata"),
    "a number that is a table": (put((*CONV, "numbers", "groups"), {}), "module 'conv': what the metadata"),
    "a number that is a fraction": (put((*CONV, "numbers", "groups"), 0.5), "'0.5' is not a whole number"),
    "a number that is huge": (put((*CONV, "numbers", "groups"), 10**18), "module 'conv': what the metadata"),
    "rows in a row": (put((*CONV, "numbers", "stride"), [[1, 1]]), "module 'conv': what the metadata"),
    "an empty row": (put((*CONV, "numbers", "stride"), []), "module 'conv': what the metadata"),
    "a larger number": (put((*CONV, "numbers", "groups"), 2), "'groups' is 2 in the file and 1 from"),
    "a negative number": (put((*CONV, "numbers", "groups"), -1), "'groups' is -1 in the file and 1 from"),
    "a longer row": (put((*CONV, "numbers", "stride"), [1, 1, 1]), "'stride' is .* in the file and"),
    "a row for a number": (put((*CONV, "numbers", "groups"), [1]), r"'groups' is \[1\] in the file and 1 from"),
    "a number for a row": (put((*CONV, "numbers", "stride"), 1), r"'stride' is 1 in the file and \(1, 1\) from"),
    "a number for a flag": (put((*CONV, "numbers", "training"), 0), "'training' is 0 in the file and True from"),
    "a number for a table": (put((*CONV, "numbers", "_parameters"), 0), "'_parameters' is 0 in the file and"),
    "a number for a string": (put((*CONV, "numbers", "padding_mode"), 0), "'padding_mode' is 0 in the file and"),
    "an order that is a string": (put((*CONV, "parameters"), "bias"), "module 'conv': what the metadata"),
    "an order of numbers": (put((*CONV, "parameters"), [1]), "module 'conv': what the metadata"),
    "no order": (without((*CONV, "parameters")), "module 'conv': what the metadata"),
    "none that is a string": (put((*CONV, "none"), "bias"), "module 'conv': what the metadata"),
    "none that holds numbers": (put((*CONV, "none"), [1]), "module 'conv': what the metadata"),
    "none that is there": (put((*CONV, "none"), ["bias"]), "'conv.bias' is in the file, which says that it is None"),
    "shared with nothing": (put(("modules", "again"), "x"), "module 'again': what the metadata"),
    "shared with what is shared": (put(("modules", "again"), "again"), "module 'again': what the metadata"),
    "shared with another": (put(("modules", "again"), "conv"), "'again' is the module 'conv' in the file and"),
    "a module too many": (put(("modules", "x"), "conv"), "1 modules of the file are not in the model: 'x'"),
    "a module too few": (without(("modules", "again")), "1 of the model are not in the file: 'again'"),
    "shape of another rank": (shaped("conv.weight", [36]), r"'conv.weight' has shape \(36,\)"),
    "shape that is larger": (shaped("linear.weight", [6, 1]), r"shape \(6, 1\) .* a cut makes nothing larger"),
    "dtype of another kind": (shaped("conv.bias", [2], "I32"), "dtype torch.int32 in the file, but shape"),
    "numbers for fractions": (shaped("steps", [2], "F64"), "dtype torch.float64 in the file, but shape"),
}


@pytest.mark.parametrize("name", EDITS)
def test_modules_that_lie(raw, name):
    edit, reason = EDITS[name]
    rewrite(raw, edit)
    message = refused(Net, raw, reason)
    assert repr(str(raw)) in message


UNKNOWN = ["calls", "__class__", "__dict__", "forward", "bias", "_parameters.x", ""]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_number_that_the_module_does_not_have_is_not_set(raw, name):
    rewrite(raw, put((*CONV, "numbers", name), 0))
    loaded = tpe.load_compact(Net, raw)
    assert name not in vars(loaded.conv)
    assert type(loaded.conv) is nn.Conv2d
    assert loaded.conv.bias.shape == (2,)


@pytest.mark.parametrize(
    "order", [[], ["bias", "weight", "x"], ["bias", "bias"], ["__class__"], ["weight", "bias"]], ids=str
)
def test_an_order_of_any_names_keeps_the_parameters(raw, order):
    rewrite(raw, put((*CONV, "parameters"), order))
    loaded = tpe.load_compact(Net, raw)
    assert sorted(loaded.conv._parameters) == ["bias", "weight"]
    assert next(iter(loaded.conv._parameters)) == ("bias" if "bias" in order[:1] else "weight")


def test_a_tensor_of_no_place(raw):
    def edit(header, about):
        header["conv.biax"] = header.pop("conv.bias")

    rewrite(raw, edit)
    refused(Net, raw, "'conv.biax'; 1 of the model .*: 'conv.bias'. 'conv.biax' is close to 'conv.bias'")


def test_ties_that_break_a_shared_module(raw):
    def edit(header, about):
        about["torchprune_ext"]["aliases"]["again.bias"] = "conv.bias"

    rewrite(raw, edit)
    refused(Net, raw, "'again.bias' is one with another in the model, but not in the file")


def test_what_the_constructor_makes_none_takes_no_more_memory_than_the_module_has(raw):
    """A sparse tensor of few bytes claims any size."""
    small = Net(2)
    small.conv.bias = nn.Parameter(torch.zeros(10**6))
    tpe.save_compact(small, raw)
    assert raw.stat().st_size < 200_000
    refused(lambda: Net(bias=False), raw, "makes None there, and no tensor of the module with more than 72 entries")


def test_a_parameter_of_whole_numbers(raw):
    rewrite(raw, shaped("conv.bias", [2], "I32"))
    refused(lambda: Net(bias=False), raw, "it is a parameter, which must be floating point")
    refused(lambda: frozen(bias=False), raw, "it is a parameter, which must be floating point")
