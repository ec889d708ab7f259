"""The states and hosts that every method is tried on."""

import pytest
import torch
from cases import ABSENT, CASES, HOSTS
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe

every_method = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
EVERY_HOST = [pytest.param(case, host, id=f"{case.id}-{host}") for case in CASES for host in case.hosts]
EVERY_BAD = [
    pytest.param(case, bad, id=f"{case.id}-{i}-{'-'.join(bad.args)}")
    for case in CASES
    for i, bad in enumerate(case.bad)
]


def fresh(module):
    """Leave the module as it is."""


def pruned_natively(module):
    """Prune once, by a hook that is no container."""
    prune.custom_from_mask(module, "weight", (torch.arange(module.weight.numel()) % 5 > 0).view_as(module.weight))


def in_a_container(module):
    """Prune three times, the last time by us."""
    pruned_natively(module)
    prune.random_unstructured(module, "weight", amount=0)
    tpe.threshold(module, "weight", 0.01)


def pruned_by_us(module):
    """Prune once, by one of our own hooks."""
    tpe.every_other(module, "weight", step=7)


STATES = (fresh, pruned_natively, in_a_container, pruned_by_us)
every_state = pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)


def make(host, state=fresh):
    """Return a module with a gradient, hooks of the user's own and the given past."""
    module = HOSTS[host]()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    module.register_forward_pre_hook(first_hook)
    state(module)
    module.register_forward_pre_hook(last_hook)
    module.register_forward_hook(after_hook)
    return module


def first_hook(module, args):
    """Stand for a hook of the user's."""


def last_hook(module, args):
    """Stand for another hook of the user's."""


def after_hook(module, args, output):
    """Stand for a hook behind the forward pass."""


def ours(module, name="weight"):
    """Return the pruning hook of ``module.<name>``."""
    hooks = module._forward_pre_hooks.values()
    (hook,) = [h for h in hooks if isinstance(h, prune.BasePruningMethod) and h._tensor_name == name]
    return hook


def drop_gradient(module, args):
    """Make 'no gradient anywhere' true where a row wants it."""
    if "grad" in args and args["grad"] in (ABSENT, None):
        for parameter in module.parameters():
            parameter.grad = None


def modules_in(module, args):
    return [module, *(value for value in args.values() if isinstance(value, nn.Module))]


def input_for(module):
    """Return a batch that the module takes."""
    channels = getattr(module, "in_channels", None)
    if channels is None:
        return torch.linspace(-1, 1, 4 * module.in_features).reshape(4, -1)
    size = (2, channels, *[5] * (module.weight.dim() - 2))
    return torch.linspace(-1, 1, torch.Size(size).numel()).reshape(size)
