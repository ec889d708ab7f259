"""How data is read: loaders, batches, options, and what a statistic may be passed as."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import torchprune_ext as tpe

calibration = tpe.calibration
quiet = {"progress": False}
LOSSES = {
    "gradients": calibration.gradients,
    "taylor": calibration.taylor,
    "taylor, batch": functools.partial(calibration.taylor, per="batch"),
    "fisher": calibration.fisher,
    "ggn": calibration.hessian_diagonal,
    "hutchinson": functools.partial(calibration.hessian_diagonal, method="hutchinson", samples=2),
    "exact": functools.partial(calibration.hessian_diagonal, method="exact"),
    "snip": calibration.snip,
    "grasp": calibration.grasp,
}
every_loss = pytest.mark.parametrize("call", LOSSES.values(), ids=LOSSES)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(8, 4), torch.arange(8) % 3, tpe.prunable_parameters(model)


# ------------------------------------------------------------------------------------------------------------ loaders


class Stream(IterableDataset):
    def __init__(self, *tensors):
        self.tensors = tensors

    def __iter__(self):
        return zip(*self.tensors, strict=True)


class Endless:
    """Has a length that it does not know."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        raise NotImplementedError

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("progress", [None, True, False])
@pytest.mark.parametrize("kind", ["stream", "unknown"])
def test_loaders_need_no_length(kind, progress):
    pytest.importorskip("tqdm")
    model, x, y, params = net()
    loader = DataLoader(Stream(x, y), batch_size=4) if kind == "stream" else Endless([(x[:4], y[:4]), (x[4:], y[4:])])
    with_length = [(x[:4], y[:4]), (x[4:], y[4:])]
    for call in (calibration.fisher, calibration.taylor):
        found = call(model, F.cross_entropy, loader, params, progress=progress)
        expected = call(model, F.cross_entropy, with_length, params, **quiet)
        for key in params:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
    tpe.compensate(model, loader, params, progress=progress)
    assert calibration.fisher(model, F.cross_entropy, loader, params, progress=progress, max_batches=1)


@pytest.mark.parametrize(
    "loader",
    [
        lambda x: [x[:4], x[4:]],
        lambda x: DataLoader(x, batch_size=4),
        lambda x: DataLoader(TensorDataset(x), batch_size=4),
        lambda x: [(x[:4],), (x[4:],)],
    ],
    ids=["tensors", "loader", "data set", "tuples"],
)
def test_unlabelled_data_needs_no_wrapper(loader):
    model, x, _, params = net()
    expected = calibration.activations(model, [(x, None)], params, **quiet)
    found = calibration.activations(model, loader(x), params, **quiet)
    for key in params:
        torch.testing.assert_close(found[key], expected[key])


@every_loss
def test_a_loss_needs_targets(call):
    model, x, _, params = net()
    for loader in ([x], [[x]]):
        with pytest.raises(TypeError, match=r"inputs without targets.*prepare="):
            call(model, F.cross_entropy, loader, params, **quiet)


def test_a_batch_is_no_loader():
    model, x, y, params = net()
    for loader in (x, (x, y), {"x": x}, 3, "data"):
        with pytest.raises(TypeError, match=r"loader is a .*\[batch\]"):
            calibration.activations(model, loader, params, **quiet)


def test_numpy_is_named():
    model, x, y, params = net()
    for batch in ((x.numpy(), y.numpy()), (x, y.numpy()), x.numpy(), {"input": np.ones((2, 4))}, (np.float32(1), x)):
        with pytest.raises(TypeError, match=r"loader gave a numpy .*torch\.as_tensor.*prepare="):
            calibration.gradients(model, F.cross_entropy, [batch], params, **quiet)
    found = calibration.gradients(
        model,
        F.cross_entropy,
        [(x.numpy(), y.numpy())],
        params,
        **quiet,
        prepare=lambda b: tuple(map(torch.as_tensor, b)),
    )
    assert set(found) == set(params)


class Features:
    """A batch of a class of its own, registered with torch's trees."""

    def __init__(self, left, right):
        self.left, self.right = left, right


pytree.register_pytree_node(Features, lambda f: ([f.left, f.right], None), lambda parts, _: Features(*parts))


class OfFeatures(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, features):
        return self.inner(features.left + features.right)


@pytest.mark.parametrize("call", [calibration.fisher, calibration.gradients, calibration.snip])
def test_registered_classes_are_trees(call):
    inner, x, y, params = net()
    expected = call(inner, F.cross_entropy, [(x, y)], params, **quiet)
    found = call(OfFeatures(inner), F.cross_entropy, [(Features(x / 4, 3 * x / 4), y)], params, **quiet)
    for key in params:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-7)


# -------------------------------------------------------------------------------------------------------- sample_mask


class Tokens(nn.Module):
    """Embeds tokens, time first inside if asked, and ends in a row per sample."""

    def __init__(self, time_first=False):
        super().__init__()
        self.words, self.mlp, self.head = nn.Embedding(9, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.time_first = time_first

    def forward(self, input_ids, **_):
        x = self.words(input_ids)
        x = self.mlp(x.transpose(0, 1) if self.time_first else x)
        return self.head(x.mean(0 if self.time_first else 1))


def padded(*lengths, longest=6):
    torch.manual_seed(1)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.randint(1, 9, mask.shape) * mask, "attention_mask": mask}


@pytest.mark.parametrize("time_first", [False, True])
def test_padding_does_not_count_in_activations(time_first):
    torch.manual_seed(0)
    model, batches = Tokens(time_first), [padded(6, 2, 3, 4), padded(1, 5, 3)]
    with torch.no_grad():
        model.words.weight[0] = 100
    params = [(model.mlp, "weight"), (model.head, "weight")]

    def keep(batch):
        return batch["attention_mask"]

    found = calibration.activations(model, batches, params, **quiet, sample_mask=keep)
    rows = torch.cat([model.words(batch["input_ids"])[batch["attention_mask"]] for batch in batches]).detach()
    torch.testing.assert_close(found[params[0]], model.mlp.weight.detach().abs() * rows.norm(dim=0))
    wrong = calibration.activations(model, batches, params, **quiet)
    assert (wrong[params[0]] > 10 * found[params[0]]).all()
    some = calibration.activations(
        model, batches, params, **quiet, sample_mask=lambda b: torch.arange(len(b["input_ids"])) != 1
    )
    rows = torch.cat(
        [model.words(b["input_ids"])[torch.arange(len(b["input_ids"])) != 1].reshape(-1, 6) for b in batches]
    )
    torch.testing.assert_close(some[params[0]], (model.mlp.weight.abs() * rows.norm(dim=0)).detach())


def test_masks_that_do_not_fit_are_refused():
    model, batch = Tokens(), padded(6, 2, 3)
    params = [(model.mlp, "weight")]
    for mask, error, message in (
        (torch.ones(3, 5).bool(), ValueError, r"5 values for each sample, of which mlp\.weight sees 6 rows"),
        (torch.ones(2, 6).bool(), ValueError, r"shape \(2, 6\) for a batch of 3 samples"),
        (torch.ones(3, 6), TypeError, "sample_mask gave torch.float32"),
        ("all", TypeError, "sample_mask gave str"),
        (torch.zeros(3, 6).bool(), ValueError, "sample_mask leaves none"),
    ):
        with pytest.raises(error, match=message):
            calibration.activations(model, [batch], params, **quiet, sample_mask=lambda _, mask=mask: mask)
    with pytest.raises(TypeError, match=r"sample_mask=.*cannot be called"):
        calibration.activations(model, [batch], params, **quiet, sample_mask=torch.ones(3))


@every_loss
def test_a_loss_decides_itself_what_counts(call):
    model, x, y, params = net()
    with pytest.raises(TypeError, match=r"the loss decides what counts.*-100"):
        call(model, F.cross_entropy, [(x, y)], params, sample_mask=lambda batch: batch[1] == 0)
    with pytest.raises(TypeError, match="loss_fn is a str"):
        call(model, "cross_entropy", [(x, y)], params)


# -------------------------------------------------------------------------------------------------- layers and experts


class Transposed(nn.Module):
    """Conv1D of the transformers library: its weight is (inputs, outputs)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


def test_activations_take_what_multiplies_as_linear():
    torch.manual_seed(0)
    model, x = nn.Sequential(Transposed(4, 6), nn.Tanh(), Transposed(6, 6)), torch.randn(5, 3, 4)
    params = [(model[0], "weight"), (model[2], "weight")]
    found = calibration.activations(model, [x], params, **quiet)
    for (module, _), inputs in zip(params, (x, model[:2](x).detach()), strict=True):
        expected = module.weight.detach().abs() * inputs.flatten(0, 1).norm(dim=0)[:, None]
        torch.testing.assert_close(found[module, "weight"], expected)


def test_activations_refuse_what_does_not():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Bilinear(4, 4, 2))
    with pytest.raises(TypeError, match=r"0\.weight.*does not multiply .*as Linear"):
        calibration.activations(model[:1], [torch.arange(9)], [(model[0], "weight")], **quiet)


class Experts(nn.Module):
    """Sends each token to the expert that it names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))

    def forward(self, x):
        route = x[:, 0].long()
        return torch.cat([expert(x[route == i]) for i, expert in enumerate(self.experts)])


def test_an_expert_without_data_is_refused_and_one_with_little_is_named():
    torch.manual_seed(0)
    model, x = Experts(), torch.rand(12, 4)
    params = [(expert, "weight") for expert in model.experts]
    with pytest.raises(ValueError, match=r"experts\.1\.weight, which no data reached.*expert"):
        calibration.activations(model, [x], params, **quiet)
    x[9:, 0], x[:4, 0] = 2.5, 1.5
    with pytest.warns(UserWarning, match=r"experts\.2\.weight saw 3 rows of data, fewer than its 4 inputs"):
        found = calibration.activations(model, [x[:8], x[8:]], params, **quiet)
    torch.testing.assert_close(found[params[1]], model.experts[1].weight.detach().abs() * x[:4].norm(dim=0))
    with pytest.raises(ValueError, match="samples"):
        calibration.activations(model, [x], params, **quiet, sample_mask=lambda x: x[:, 0] > 0.5)


def test_inputs_of_zero_are_told():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(model[0].bias, -100.0)
    with pytest.warns(UserWarning, match=r"all inputs of 2\.weight are 0"):
        calibration.activations(model, [torch.rand(8, 4)], [(model[2], "weight")], **quiet)


# --------------------------------------------------------------------------------------------------------------- kinds


def test_statistics_know_what_they_are():
    model, x, y, params = net()
    loader = [(x, y)]
    curvature = calibration.fisher(model, F.cross_entropy, loader, params, **quiet)
    gradients = calibration.gradients(model, F.cross_entropy, loader, params, **quiet)
    scores = calibration.taylor(model, F.cross_entropy, loader, params, **quiet)
    hessian = calibration.hessian_diagonal(model, F.cross_entropy, loader, params, **quiet)
    before = copy.deepcopy(model.state_dict())
    for wrong in (curvature, hessian, copy.deepcopy(curvature), pickle.loads(pickle.dumps(curvature))):
        named = wrong if set(wrong) == set(params) else type(wrong)(zip(params, wrong.values(), strict=True))
        for call in (tpe.global_unstructured, tpe.global_kernel_ln, tpe.global_ln_structured, tpe.global_vector_ln):
            if call is not tpe.global_kernel_ln:
                with pytest.raises(
                    TypeError, match=r"importance_scores holds a curvature.*hessian_diag= to global_obd"
                ):
                    call(params, amount=0.5, importance_scores=named)
        with pytest.raises(TypeError, match="grad holds a curvature"):
            tpe.global_gradient_magnitude(params, amount=0.5, grad=named)
    for wrong, kind in ((scores, "importance scores"), (gradients, "gradients")):
        with pytest.raises(TypeError, match=f"hessian_diag holds {kind}"):
            tpe.global_obd_saliency(params, amount=0.5, hessian_diag=wrong)
    with pytest.raises(TypeError, match="grad holds importance scores"):
        tpe.global_gradient_magnitude(params, amount=0.5, grad=scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for call, argument, right in (
        (tpe.global_unstructured, "importance_scores", scores),
        (tpe.global_unstructured, "importance_scores", gradients),
        (tpe.global_unstructured, "importance_scores", calibration.random(params)),
        (tpe.global_unstructured, "importance_scores", dict(curvature)),
        (tpe.global_gradient_magnitude, "grad", gradients),
        (tpe.global_obd_saliency, "hessian_diag", curvature),
        (tpe.global_obd_saliency, "hessian_diag", hessian),
    ):
        call(params, amount=0.5, **{argument: right})
        tpe.undo_all(model)
