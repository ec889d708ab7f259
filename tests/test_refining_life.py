"""A refined model among the other calls: fitted again, undone, told of; and models of other kinds."""

import copy

import pytest
import torch
from compensating import Conv1D
from test_refining import QUIET, Stack, adam, apart, data, made
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def test_what_was_refined_is_fitted_again_to_the_dense_model_only():
    model, dense, params = made(seed=1)
    batches = data()
    tpe.compensate(model, batches, params, dense=dense, **QUIET)
    first = tpe.refine(model, batches, dense=dense, epochs=2, optimizer=adam(1e-2), **QUIET)
    again = tpe.compensate(model, batches, params, dense=dense, **QUIET)
    second = tpe.refine(model, batches, dense=dense, epochs=2, optimizer=adam(1e-2), **QUIET)
    assert first.model.after < first.model.before
    assert len(again) == len(params)
    assert second.model.after <= second.model.before
    module, name = params[1]
    assert tpe.history(module, name)[-3:] == ["refine(epochs=2)", "compensate()", "refine(epochs=2)"]
    for call in (tpe.compensate, lambda model, data, params, **options: tpe.refine(model, data, **options)):
        with pytest.raises(ValueError, match=r"has changed since it was pruned .* Pass dense="):
            call(model, batches, params, **QUIET)


@pytest.mark.parametrize("native", [False, True])
def test_a_change_is_known_and_undo_warns(native):
    torch.manual_seed(0)
    model = Stack(2)
    dense = copy.deepcopy(model)
    params = tpe.prunable_parameters(model)
    if native:
        prune.global_unstructured(params, prune.L1Unstructured, amount=0.5)
    else:
        tpe.global_unstructured(params, amount=0.5)
    done = tpe.refine(model, data(), epochs=2, whole=True, optimizer=adam(1e-2), **QUIET)  # without dense=
    assert done.model.best
    module, name = params[1]
    with pytest.raises(ValueError, match="has changed since it was pruned"):
        tpe.compensate(model, data(), [(module, name)], **QUIET)
    mask = module.weight_mask.clone()
    with pytest.warns(UserWarning, match="the survivors were re-fitted"):
        tpe.undo_all(model)
    old = dict(dense.named_modules())["layers.0.up"].weight
    assert torch.equal(module.weight[mask == 0], old[mask == 0])
    assert not torch.equal(module.weight[mask == 1], old[mask == 1])


def test_without_dense_it_is_the_model_under_the_masks():
    results = []
    for given in (False, True):
        model, dense, _ = made(seed=1)
        done = tpe.refine(
            model, data(), dense=dense if given else None, epochs=2, optimizer=adam(1e-2), whole=True, **QUIET
        )
        results.append((done, list(model.state_dict().values())))
    assert results[0][0] == results[1][0]
    assert all(map(torch.equal, results[0][1], results[1][1]))


@pytest.mark.parametrize("kind", ["state", "values"])
def test_dense_may_be_a_state_dict_or_the_values_of_what_was_pruned(kind):
    expected, dense, _ = made(seed=1)
    model = Stack()
    model.load_state_dict(dense.state_dict())
    params = tpe.prunable_parameters(model)
    given = copy.deepcopy(model.state_dict()) if kind == "state" else tpe.dense_values(model, params)
    tpe.global_unstructured(params, target_sparsity=0.5)
    results = [
        tpe.refine(each, data(), dense=reference, epochs=2, optimizer=adam(1e-2), **QUIET)
        for each, reference in ((model, given), (expected, dense))
    ]
    assert results[0] == results[1]
    assert results[0].model.best


def test_nothing_is_written_down_where_nothing_got_better():
    model, dense, params = made()
    before = [tpe.history(*pair) for pair in params]
    done = tpe.refine(model, data(), dense=dense, epochs=2, optimizer=adam(1e9), **QUIET)
    assert done.model.best == 0
    assert done.model.before == done.model.after
    assert [tpe.history(*pair) for pair in params] == before
    tpe.compensate(model, data(), params, **QUIET)  # which would be refused if it had changed


# ------------------------------------------------------------------------------------------------------ other models


class Images(nn.Module):
    """Convolutions with BatchNorm, dropout and a residual, and operations in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(self.block() for _ in range(2)))
        self.head = nn.Linear(4, 3)

    @staticmethod
    def block():
        return nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout())

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class Tied(nn.Module):
    """Two tokens' embedding is the output layer, and two layers share a weight."""

    def __init__(self):
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.b.weight, self.out.weight = self.a.weight, self.table.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.b(torch.tanh(self.a(self.table(tokens))))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Conv1D(5, 4), Conv1D(4, 3)

    def forward(self, x):
        return {"hidden": (y := torch.relu(self.a(x))), "logits": self.b(y)}


def tokens():
    torch.manual_seed(0)
    return [torch.randint(7, (8, 3)) for _ in range(4)]


MODELS = {
    "channels last": (lambda: Images().to(memory_format=torch.channels_last), lambda: data(4, 4, (2, 6, 6))),
    "images": (Images, lambda: data(4, 4, (2, 6, 6))),
    "recurrent": (Recurrent, lambda: data(4)),
    "tied": (Tied, tokens),
    "dictionaries": (GPT, lambda: [{"x": x} for x in data(4)]),
    "half": (lambda: Stack(2).bfloat16(), lambda: [x.bfloat16() for x in data(4)]),
    "double": (lambda: Stack(2).double(), lambda: [x.double() for x in data(4)]),
    "attention": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Linear(6, 3)),
        lambda: data(4, 8, (4, 6)),
    ),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_many_kinds_get_better(kind, whole):
    make, give = MODELS[kind]
    torch.manual_seed(0)
    model = make().train()
    dense, batches = copy.deepcopy(model), give()
    params = [
        (m, "weight")
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, Conv1D)) and "NonDyn" not in str(m)
    ]
    params += [(m, "weight_hh_l0") for m in model.modules() if isinstance(m, nn.LSTM)]
    tpe.global_unstructured(params, target_sparsity=0.5)
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    layouts = [(p, p.stride(), p.dtype) for p in model.parameters()]
    table = model.table.weight.detach().clone() if kind == "tied" else None
    done = tpe.refine(model, batches, dense=dense, epochs=6, whole=whole, optimizer=adam(2e-3), **QUIET)
    assert done.model.best, done
    assert done.model.after < done.model.before
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    for (parameter, stride, dtype), now in zip(layouts, model.parameters(), strict=True):
        assert parameter is now
        assert now.stride() == stride
        assert now.dtype == dtype
    assert all(module.training for module in model.modules())
    for _, module, name in tpe.pruned_parameters(model):
        assert not getattr(module, name)[getattr(module, f"{name}_mask") == 0].any()
    if kind == "tied":
        assert torch.equal(model.table.weight, table)
        assert model.a.weight_orig is model.b.weight_orig
        assert model.out.weight_orig is model.table.weight_orig if hasattr(model.table, "weight_orig") else True


def test_samples_and_tokens_that_do_not_count_are_left_out():
    results = []
    for rubbish in (0.0, 100.0):
        model, dense, _ = made(seed=1)
        batches = data()
        for x in batches:
            x[:, 3] = rubbish  # the last token of each sample
            x[0] = rubbish  # the first sample
        mask = torch.ones(8, 4, dtype=torch.bool)
        mask[:, 3] = mask[0] = False
        done = tpe.refine(
            model, batches, dense=dense, epochs=2, optimizer=adam(1e-2), sample_mask=lambda _, m=mask: m, **QUIET
        )
        results.append((done, model.state_dict()))
    assert results[0][0].model.best
    assert results[0][0].model.after == pytest.approx(results[1][0].model.after, rel=1e-4)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=1e-3, atol=1e-4)
    model, dense, _ = made(seed=1)
    [alone] = [data()[0][1:, :3]]
    with torch.no_grad():
        expected = apart(model(alone), dense(alone))
    same = [data()[0]] * 2
    done = tpe.refine(model, same, dense=dense, epochs=1, whole=True, sample_mask=lambda _: mask, **QUIET)
    assert done.model.before == pytest.approx(float(expected), rel=1e-4)


def test_the_loss_of_the_output_may_be_another():
    model, dense, _ = made(seed=1)
    seen = []

    def divergence(output, target):
        seen.append(output.shape)
        return nn.functional.kl_div(
            output.flatten(0, -2).log_softmax(-1), target.flatten(0, -2).softmax(-1), reduction="batchmean"
        )

    done = tpe.refine(
        model, data(), dense=dense, blocks=[model], epochs=3, loss=divergence, optimizer=adam(1e-2), **QUIET
    )
    x = data()[3]
    with torch.no_grad():
        assert done.model.after == pytest.approx(float(divergence(model(x), dense(x))), rel=1e-5)
    assert done.model.after < done.model.before
    assert set(seen) == {(8, 4, 3)}


def test_zeros_that_were_made_permanent_stay_if_they_are_remembered():
    model, dense, params = made(seed=1)
    tpe.remove_all(model, keep_zeros=True)
    zeros = [module.weight == 0 for module, _ in params]
    done = tpe.refine(model, data(), dense=dense, epochs=2, whole=True, optimizer=adam(1e-2), **QUIET)
    assert done.model.best
    for (module, _), where in zip(params, zeros, strict=True):
        assert torch.equal(module.weight == 0, where)
    plain, dense, _ = made(seed=1)
    tpe.remove_all(plain)
    with pytest.warns(UserWarning, match="Zeros without a mask"):
        tpe.refine(plain, data(), dense=dense, epochs=1, **QUIET)


def test_the_result_is_a_table():
    model, dense, _ = made(seed=1)
    done = tpe.refine(model, data(), dense=dense, epochs=1, **QUIET)
    lines = str(done).splitlines()
    assert lines[0].split() == ["block", "before", "after", "epoch"]
    assert [line.split()[0] for line in lines[1:]] == ["layers.0", "layers.1", "layers.2", "Stack"]
    assert done.to_dict()["model"]["epochs"] == 1
