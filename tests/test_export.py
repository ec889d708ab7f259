"""A compacted model, loaded from its file, goes where plain models go: training, export, compilation, ONNX Runtime."""

import copy

import pytest
import torch
from cutting import MODELS, alive
from releases import OLD

import torchprune_ext as tpe


def output(model, arguments):
    with torch.no_grad():
        found = model(*arguments)
    return found if isinstance(found, torch.Tensor) else found[0]


def assert_close(found, expected):
    """Check that what other code computes differs by rounding only: sums of fewer than 100 terms, in another order."""
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * 2**-24 * float(expected.abs().max()))


def skip_if_too_old(model):
    """Skip what torch 2.4 cannot trace."""
    if OLD and type(model).__name__ == "BertModel":
        pytest.skip("torch 2.4 cannot trace the outputs of the transformers package")


@pytest.fixture(params=list(MODELS))
def case(request, tmp_path):
    """Return a model that was loaded, the one that was saved, and a function that makes inputs of a batch size."""
    if request.param == "bert":
        pytest.importorskip("transformers", reason="BERT comes with the transformers package")
    torch.manual_seed(0)
    dense, cut, inputs = MODELS[request.param]
    small = alive(cut())
    tpe.save_compact(small, tmp_path / "small.safetensors")
    return tpe.load_compact(lambda: dense().eval(), tmp_path / "small.safetensors"), small, inputs


def test_it_computes_the_same_bits(case):
    loaded, small, inputs = case
    arguments = inputs(3)
    assert torch.equal(output(loaded, arguments), output(small, arguments))


def test_it_trains_on_to_the_same_bits(case):
    loaded, small, inputs = case
    arguments = inputs(3)
    for model in (loaded, small):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            torch.manual_seed(1)
            found = model(*arguments)
            (found if isinstance(found, torch.Tensor) else found[0]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(loaded.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_it_is_copied(case):
    loaded, small, inputs = case
    arguments = inputs(2)
    assert torch.equal(output(copy.deepcopy(loaded), arguments), output(small, arguments))


def test_torch_export(case):
    loaded, small, inputs = case
    skip_if_too_old(loaded)
    arguments = inputs(2)
    program = torch.export.export(loaded, arguments)
    assert_close(output(program.module(), arguments), output(small, arguments))


def test_torch_compile(case):
    loaded, small, inputs = case
    skip_if_too_old(loaded)
    arguments = inputs(2)
    torch.compiler.reset()
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    assert_close(output(compiled, arguments), output(small, arguments))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of torch before 2.9, whose exporter traces
def test_onnx_runtime(case, tmp_path):
    needed = ["onnx", "onnxruntime"] if OLD else ["onnx", "onnxruntime", "onnxscript"]
    runtime = [pytest.importorskip(name, reason="needs pip install torchprune_ext[onnx]") for name in needed][1]
    loaded, small, inputs = case
    arguments = inputs(2)
    dynamic = {} if OLD else {"dynamic_shapes": tuple({0: torch.export.Dim.DYNAMIC} for _ in arguments)}
    torch.onnx.export(loaded, arguments, tmp_path / "small.onnx", verbose=False, **dynamic)
    session = runtime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    for count in (2,) if OLD else (2, 3):  # before dynamo, the size of the batch is fixed as it is written here
        arguments = inputs(count)
        names = [each.name for each in session.get_inputs()]
        found = session.run(None, {n: a.numpy() for n, a in zip(names, arguments, strict=True)})
        expected = output(small, arguments)
        # one and the same sum of at most 100 terms, in another order
        torch.testing.assert_close(
            torch.from_numpy(found[0]), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )


def test_what_torch_pruning_cuts_comes_back(tmp_path):
    pruning = pytest.importorskip("torch_pruning")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)

    def constructor():
        return models.mobilenet_v3_small(num_classes=5).eval()

    small = constructor()
    group = pruning.importance.GroupMagnitudeImportance()
    pruning.pruner.MetaPruner(small, x, group, pruning_ratio=0.6, ignored_layers=[list(small.modules())[-1]]).step()
    tpe.save_compact(small, tmp_path / "small.safetensors")
    loaded = tpe.load_compact(constructor, tmp_path / "small.safetensors")
    assert str(loaded) == str(small) != str(constructor())
    assert torch.equal(output(loaded, (x,)), output(small, (x,)))
