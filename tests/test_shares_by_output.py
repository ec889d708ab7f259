"""Shares of one budget of entries, chosen by what pruning a layer does to the model's output."""

import copy

import compensating
import pytest
import snapshots
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchprune_ext as tpe
from torchprune_ext.compensation import by_output
from torchprune_ext.compensation.by_output import Columns, share

pytestmark = compensating.MARKS
auto = compensating.prune_and_compensate


def network(seed=0):
    """Return a network whose first layer reads features that depend on each other, and batches for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    x = torch.randn(480, 3) @ torch.randn(3, 12)
    return model, tpe.prunable_parameters(model), [(batch, None) for batch in x.split(60)]


def gone(params):
    return sum(int((module.weight == 0).sum()) for module, _ in params)


def output_error(model, dense, data):
    errors = []
    for batch, _ in data[:: by_output.ASIDE]:
        with torch.no_grad():
            y, other = dense(batch), model(batch)
        errors.append(float((y - other).square().sum() / (y - y.mean()).square().sum()))
    return sum(errors) / len(errors)


# ------------------------------------------------------------------------------------------------------- the sharing

alive = st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4)


@given(st.lists(alive, min_size=1, max_size=4), st.data())
def test_steps_are_taken_cheapest_first_and_none_that_is_not_needed(masks, data):
    """Whatever is pruned already; ties are common."""
    columns = [Columns.of(torch.tensor(mask, dtype=torch.float32).unsqueeze(0)) for mask in masks]
    total = sum(each.entries for each in columns)
    dead = total - sum(sum(each.alive) for each in columns)
    most = total - sum(each.alive[0] for each in columns if each.alive)
    goal = data.draw(st.integers(dead, most))
    prices = [data.draw(st.sampled_from([0.0, 1.0, 2.0])) for _ in columns]
    kept = share(columns, goal, lambda place, gone: prices[place] * gone)
    keep, more = [each.most for each in kept], sum(each.more for each in kept)
    assert sum(each.more > 0 for each in kept) <= 1

    def left(place, count):  # the definition: rows lose entries until they have at most so many
        return sum(min(sum(row), count) for row in masks[place])

    assert all(count >= min(1, len(each.alive)) for count, each in zip(keep, columns, strict=True))
    reached = total - sum(left(place, count) for place, count in enumerate(keep))
    assert reached - more == goal
    assert all(each.more <= sum(sum(row) > each.most for row in mask) for each, mask in zip(kept, masks, strict=True))
    for place, (count, each) in enumerate(zip(keep, columns, strict=True)):
        if count < len(each.alive):  # a step back would miss the goal
            assert reached - (left(place, count + 1) - left(place, count)) < goal
    if all(left(place, 3) == 3 * len(mask) for place, mask in enumerate(masks)) and len({map(len, masks)}) == 1:
        fractions = [
            prices[place] * each.gone(count) for place, (count, each) in enumerate(zip(keep, columns, strict=True))
        ]
        ahead = [prices[p] * each.gone(c - 1) for p, (c, each) in enumerate(zip(keep, columns, strict=True)) if c > 1]
        assert max(fractions) <= min(ahead, default=2.0)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.93])
def test_the_budget_is_met_over_all_entries(sparsity):
    """And no row loses all."""
    model, params, data = network()
    fits = auto(model, data, params, target_sparsity=sparsity, allocation="auto")
    assert gone(params) == round(sparsity * 960)
    assert gone(params) == sum(fit.pruned for fit in fits.values())
    for module, _ in params:
        assert len(set(module.weight_mask.sum(1).tolist())) <= 2
        assert module.weight_mask.sum(1).min() >= 1


# ------------------------------------------------------------------------------------------------------- what it wins


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_shares_beat_equal_ones_on_data_kept_aside(sparsity):
    """And the errors told are those of the definition."""
    dense, _, data = network()
    fitted = [batch for place, batch in enumerate(data) if place % by_output.ASIDE]
    model = copy.deepcopy(dense)
    params = tpe.prunable_parameters(model)
    fits = auto(model, data, params, target_sparsity=sparsity, allocation="auto")
    assert len(fits.rounds) > 1
    assert min(fits.rounds) < 0.8 * fits.rounds[0]

    goals = {key: fit.sparsity for key, fit in fits.items()}
    assert len({round(goal, 2) for goal in goals.values()}) > 1
    again = copy.deepcopy(dense)
    keys = tpe.prunable_parameters(again)
    auto(again, fitted, keys, target_sparsity=dict(zip(keys, goals.values(), strict=True)))
    assert output_error(again, dense, data) == pytest.approx(min(fits.rounds), rel=1e-3)


def test_the_last_pass_is_the_plain_call_with_these_shares():
    dense, _, data = network()
    model, again = copy.deepcopy(dense), copy.deepcopy(dense)
    fits = auto(model, data, tpe.prunable_parameters(model), target_sparsity=0.6, allocation="auto")
    keys = tpe.prunable_parameters(again)
    auto(again, data, keys, target_sparsity=dict(zip(keys, [f.sparsity for f in fits.values()], strict=True)))
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_prices_are_the_rise_of_the_error_that_is_measured():
    """The gradient half way is the central difference, exactly so for one layer that ends a model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6))
    x = torch.randn(480, 5) @ torch.randn(5, 12)
    params, data = tpe.prunable_parameters(model), [(batch, None) for batch in x.split(60)]
    task = by_output.Task.of(model, data, params, None, {"progress": False})
    search = by_output.Search(task, 0.5, lambda goals: lambda layer, problem, weight, alive: (weight, alive))
    found = search.round(None)
    [tried] = search.tried.values()
    ends, errors = (-0.5, 0.5), []
    for sign in ends:
        end = copy.deepcopy(model)
        end[0].weight.data += tried.middle[0] + sign * tried.change[0] - model[0].weight.data
        end[0].bias.data = tried.middle[1] + sign * tried.change[1]
        errors.append(output_error(end, model, data))
    assert found.prices == pytest.approx([(errors[1] - errors[0]) / tried.entries], rel=1e-3)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_equal_shares_stay_where_nothing_is_better(monkeypatch):
    dense, _, data = network()
    model = copy.deepcopy(dense)
    times, measure, first = iter([1.0, 1.0, 2.0]), by_output.Search._measure, []

    def worse(*given):
        error, prices = measure(*given)
        first.append(error)
        return next(times) * first[0], prices

    monkeypatch.setattr(by_output.Search, "_measure", worse)
    fits = auto(model, data, tpe.prunable_parameters(model), target_sparsity=0.5, allocation="auto")
    assert len(fits.rounds) == 1 + by_output.FAILURES
    assert [fit.sparsity for fit in fits.values()] == [0.5, 0.5, 0.5]


def test_the_order_of_params_does_not_matter():
    dense, _, data = network()
    found = []
    for turn in (1, -1):
        model = copy.deepcopy(dense)
        params = tpe.prunable_parameters(model)
        auto(model, data, params[::turn], target_sparsity=0.6, allocation="auto")
        found.append([module.weight.detach() for module, _ in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("criterion", ["obs", "wanda", "magnitude"])
def test_shares_are_chosen_for_the_criterion_that_is_asked_for(criterion):
    model, params, data = network()
    fits = auto(model, data, params, target_sparsity=0.6, allocation="auto", criterion=criterion, steps=2)
    assert gone(params) == 576
    assert min(fits.rounds) < fits.rounds[0]


# ----------------------------------------------------------------------------------------------------- kinds of models


def test_convolutions_groups_and_layers_without_bias():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 3)
    )
    params, data = tpe.prunable_parameters(model), [torch.randn(30, 2, 6, 6) for _ in range(5)]
    total = sum(module.weight.numel() for module, _ in params)
    auto(model, data, params, target_sparsity=0.5, allocation="auto")
    assert gone(params) == round(0.5 * total)
    assert model[0].bias is None


class Several(compensating.Tokens):
    def forward(self, x):
        y = super().forward(x)
        return {"tokens": y, "number": torch.ones(len(x), dtype=torch.int64), "pooled": y[:, 0]}


class TokensFirst(compensating.Tokens):
    def forward(self, x):
        return super().forward(x).transpose(0, 1)


@pytest.mark.parametrize(("kind", "samples"), [(Several, 16), (TokensFirst, 16), (TokensFirst, 5)])
def test_masked_tokens_do_not_count_whatever_the_outputs(kind, samples):
    """In the inputs nor in the outputs; nor where the mask would fit these the wrong way round."""
    torch.manual_seed(0)
    dense, masks = kind(), [torch.rand(samples, 5) < 0.7 for _ in range(6)]
    for mask in masks:
        mask[:, 0] = True
    clean = [torch.randn(samples, 5, 4) for _ in masks]
    wild = [torch.where(m.unsqueeze(-1), x, 1e3 * torch.randn_like(x)) for x, m in zip(clean, masks, strict=True)]
    rounds = []
    for data in (clean, wild):
        model, left = copy.deepcopy(dense), iter(masks)
        fits = auto(
            model,
            list(data),
            tpe.prunable_parameters(model),
            target_sparsity=0.4,
            allocation="auto",
            sample_mask=lambda x, data=data: masks[[x is each for each in data].index(True)],
        )
        rounds.append(list(fits.rounds))
        assert next(left) is masks[0]
    assert rounds[0] == pytest.approx(rounds[1], rel=1e-4)


def test_a_layer_of_zeros_and_one_that_nothing_depends_on():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.zero, self.idle, self.head = (nn.Linear(8, 8) for _ in range(4))
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            x = self.a(x).relu()
            self.idle(x)
            return self.head(x) + self.zero(x)

    torch.manual_seed(0)
    model, data = Model(), [torch.randn(40, 8) for _ in range(5)]
    params = tpe.prunable_parameters(model)
    fits = auto(model, data, params, target_sparsity=0.5, allocation="auto")
    assert sum(fit.pruned for fit in fits.values()) == 128
    shares = {module: fit.sparsity for (module, _), fit in fits.items()}
    assert min(shares[model.zero], shares[model.idle]) > max(shares[model.a], shares[model.head])


def test_what_is_pruned_already_counts_and_stays_pruned():
    dense, _, data = network()
    model = copy.deepcopy(dense)
    params = tpe.prunable_parameters(model)
    tpe.global_unstructured(params, target_sparsity=0.4)
    before = [module.weight_mask.clone() for module, _ in params]
    auto(model, data, params, target_sparsity=0.6, allocation="auto", dense=dense)
    assert gone(params) == 576
    assert all((module.weight_mask <= mask).all() for (module, _), mask in zip(params, before, strict=True))


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"allocation": "owl"}, ValueError, r"allocation='owl' is not 'auto'\. Pass that, or .* as target_sparsity="),
        ({"allocation": {}}, TypeError, r"allocation=\{\} is not 'auto'"),
        ({"target_sparsity": None, "pattern": tpe.NM(2, 4)}, TypeError, r"allocation='auto', pattern=NM.*same share"),
        ({"unit": tpe.Channel(dim=1)}, TypeError, r"allocation='auto', unit=Channel.*target_macs="),
        ({"target_sparsity": None, "target_macs": 0.5}, TypeError, r"target_macs=0\.5, allocation='auto'"),
        ({"target_sparsity": 1.0}, ValueError, r"takes 960 of the 960 .* Pass 0\.9458 or less"),
        ({"target_sparsity": 0.3}, ValueError, r"is 288 of the 960 listed entries, but 480 are pruned already"),
        ({"max_batches": 1}, ValueError, r"loader gave one\. Pass at least two"),
    ],
)
def test_bad_arguments_change_nothing(given, error, match):
    model, params, data = network()
    if given.get("target_sparsity") == 0.3:
        for module, name in params:
            tpe.global_unstructured([(module, name)], target_sparsity=0.5)
    snapshot = snapshots.Snapshot(model)
    with pytest.raises(error, match=match):
        auto(model, data, params, **{"target_sparsity": 0.5, "allocation": "auto", **given})
    assert not snapshot.differences()


def test_a_mapping_has_its_shares_already():
    model, params, data = network()
    with pytest.raises(TypeError, match=r"target_sparsity=\{\.\.\.\}: each tensor has its share already"):
        auto(model, data, params, target_sparsity=dict.fromkeys(params, 0.5), allocation="auto")


class Broken(nn.Module):
    """Gives on data what ``how`` makes of what a layer gives."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(6, 4), how

    def forward(self, x):
        return self.how(self.layer(x), x)


def interrupted(y, x):
    if torch.is_grad_enabled():
        raise KeyboardInterrupt
    return y


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        (lambda y, x: (y > 0).long(), ValueError, "no floating-point tensor"),
        (lambda y, x: y.detach(), ValueError, "depends on none of params"),
        (lambda y, x: y / 0, ValueError, "NaN or infinity on the data kept aside"),
        (lambda y, x: y[y > 0], ValueError, "cannot be compared. Leave allocation='auto' out"),
        (interrupted, KeyboardInterrupt, None),
    ],
)
def test_outputs_that_cannot_be_compared_change_nothing(how, error, match):
    torch.manual_seed(0)
    model, data = Broken(how), [torch.randn(20, 6) for _ in range(5)]
    snapshot = snapshots.Snapshot(model)
    with pytest.raises(error, match=match):
        auto(model, data, tpe.prunable_parameters(model), target_sparsity=0.5, allocation="auto")
    assert not snapshot.differences()


def test_the_model_is_left_as_it_was_in_mode_and_gradients():
    model, params, data = network()
    model.train()
    with torch.inference_mode():
        auto(model, data, params, target_sparsity=0.5, allocation="auto")
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- the table


def test_the_table_tells_what_each_layer_got():
    model, params, data = network()
    fits = auto(model, data, params, target_sparsity=0.5, allocation="auto")
    lines = str(fits).splitlines()
    assert lines[0].split() == ["weight", "entries", "pruned", "error", "if", "zeroed", "re-fitted"]
    assert [line.split()[0] for line in lines[1:-1]] == ["0.weight", "2.weight", "4.weight", "all"]
    assert lines[-2].split()[1:] == ["960", "50.0", "%"]
    assert lines[-1].startswith("error of the output on data kept aside: ")
    assert lines[-1].count(",") == len(fits.rounds) - 1
    plain, keys, _ = network()
    assert "kept aside" not in str(auto(plain, data, keys, target_sparsity=0.5))
