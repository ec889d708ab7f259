"""Batches of their own that tell whether a refined model gets better."""

import pytest
import torch
from test_refining import QUIET, adam, data, made, split

import torchprune_ext as tpe


@pytest.mark.parametrize("whole", [True, False])
def test_the_batches_that_a_fraction_would_keep_aside_give_the_same(whole):
    fraction, own = made(), made()
    batches = data(batches=10)
    fit, aside = split(batches, 0.2)
    how = {"whole": whole, "epochs": 3, "optimizer": adam(1e-2), **QUIET}
    done = [
        tpe.refine(fraction[0], batches, dense=fraction[1], held_out=0.2, **how),
        tpe.refine(own[0], fit, dense=own[1], held_out=(each for each in aside), max_batches=8, **how),
    ]
    for name, value in fraction[0].state_dict().items():
        assert torch.equal(value, own[0].state_dict()[name]), name
    assert str(done[0]) == str(done[1])


def test_one_batch_will_do_and_it_never_gets_worse_on_the_others():
    model, dense, _ = made()
    fit, others = data(batches=1), data(batches=3, seed=9)
    before = sum(float((model(x) - dense(x)).detach().square().sum()) for x in others)
    done = tpe.refine(model, fit, dense=dense, whole=True, epochs=5, held_out=others, optimizer=adam(10.0), **QUIET)
    assert done.model.best == 0  # so absurd a rate helps nowhere
    assert sum(float((model(x) - dense(x)).detach().square().sum()) for x in others) == pytest.approx(before)


@pytest.mark.parametrize(
    ("held_out", "kind", "words"),
    [
        ([], ValueError, "held_out: loader gave no batch"),
        (torch.ones(2, 5), TypeError, "held_out: loader is a Tensor"),
        ("some", TypeError, "held_out='some' is a str"),
        (None, TypeError, "held_out=None is a NoneType"),
    ],
)
def test_what_gives_no_batches_is_refused(held_out, kind, words):
    model, dense, _ = made()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(kind, match=words):
        tpe.refine(model, data(), dense=dense, held_out=held_out, **QUIET)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_a_mask_that_leaves_all_of_one_kind_out_is_refused():
    model, dense, _ = made()
    other = data(batches=1, seed=5)
    for fit, aside, name in ((data(), other, "held_out"), (other, data(), "loader")):
        with pytest.raises(ValueError, match=f"{name}: sample_mask leaves out every sample"):
            tpe.refine(
                model,
                fit,
                dense=dense,
                held_out=aside,
                sample_mask=lambda x: torch.full((len(x),), not torch.equal(x, other[0])),
                **QUIET,
            )
