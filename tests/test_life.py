"""The life of a pruned model as a state machine: whatever happens in whatever order, the masks hold."""

import collections
import copy
import io
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import torchprune_ext as tpe

LAYERS = ("conv", "hidden", "mix.out_proj", "head")
STATISTICS = collections.Counter()  # rules that were run, examples, the longest sequence


class Network(nn.Module):
    """A convolution with its BatchNorm, attention whose parent reads a child, tied linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1, bias=False), nn.BatchNorm1d(4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mT
        x = x + self.mix(x, x, x, need_weights=False)[0]
        return self.head(self.hidden(x).relu())


def scores(tensor):
    return torch.arange(tensor.numel(), dtype=torch.float32).mul(7).remainder(11).reshape(tensor.shape)


def dense(module):
    return module._parameters.get("weight", module._parameters.get("weight_orig"))


NATIVE = {
    "l1": lambda m, a: prune.l1_unstructured(m, "weight", amount=a),
    "random": lambda m, a: prune.random_unstructured(m, "weight", amount=a),
    "ln": lambda m, a: prune.ln_structured(m, "weight", amount=a, n=2, dim=0),
    "identity": lambda m, a: prune.identity(m, "weight"),
    "custom": lambda m, a: prune.custom_from_mask(m, "weight", (scores(dense(m)) > 11 * a).float()),
}
OURS = {
    "threshold": lambda m, a: tpe.threshold(m, "weight", a / 4),
    "every_other": lambda m, a: tpe.every_other(m, "weight", 3),
    "gradient": lambda m, a: tpe.gradient_magnitude(m, "weight", a, grad=scores(dense(m))),
    "obd": lambda m, a: tpe.obd_saliency(m, "weight", a, hessian_diag=scores(dense(m))),
    "vector": lambda m, a: tpe.vector_ln(m, "weight", a, n=1),
    "nm": lambda m, a: tpe.nm_structured(m, "weight", 2, 4) if dense(m).dim() == 2 else tpe.kernel_ln(m, "weight", a),
}
GLOBAL = {
    "entries": lambda p, a: tpe.global_unstructured(p, a),
    "vectors": lambda p, a: tpe.global_vector_ln(p, a),
    "native": lambda p, a: prune.global_unstructured(p, prune.L1Unstructured, amount=a),
}
FLOATS = st.sampled_from([torch.float64, torch.bfloat16, torch.float16])
SEED = st.integers(0, 99)
AMOUNT = st.sampled_from([0.0, 0.2, 0.5])
PATH = st.sampled_from(LAYERS)


def values(model):
    """Return the effective weights by plain means: name and mask, name and values."""
    state = model.state_dict()
    masks = {name.removesuffix("_mask"): mask for name, mask in state.items() if name.endswith("_mask")}
    weights = {name.removesuffix("_orig"): tensor for name, tensor in state.items() if not name.endswith("_mask")}
    return masks, {name: tensor * masks.get(name, 1) for name, tensor in weights.items()}


def storages(model):
    return {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}


def close(got, want):
    bound = 64 * torch.finfo(want.dtype).eps  # of values of about 1, through six products
    torch.testing.assert_close(got, want, rtol=bound, atol=bound, equal_nan=True)  # Adam overflows in half precision


class Life(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Network()
        self.x = torch.randn(3, 4, 5)
        self.objects = dict(self.model.named_parameters())
        self.order = list(self.objects)
        self.optimizers = [
            torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9, weight_decay=0.01),
            torch.optim.Adam(self.model.parameters(), 0.01),
        ]
        self.masks, self.saved, self.average, self.kept, self.compiled = {}, None, None, None, None
        self.others = []  # copies and originals, with what they were
        self.steps = self.compiles = 0
        STATISTICS["examples"] += 1

    def count(self, name):
        self.steps += 1
        STATISTICS[name] += 1
        STATISTICS["longest"] = max(STATISTICS["longest"], self.steps)

    def module(self, path):
        return self.model.get_submodule(path)

    def pruned(self):
        return [(module, name) for _, module, name in tpe.pruned_parameters(self.model)]

    @property
    def dtype(self):
        return self.model.head.bias.dtype

    def refused(self, call, *args, **kwargs):
        """Run a call that may refuse; then it must have changed nothing."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a layer is emptied, say
            try:
                call(*args, **kwargs)
            except ValueError:
                now = self.model.state_dict()
                assert list(now) == list(before)
                assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
                return False
        return True

    # -- pruning ----------------------------------------------------------------------------------------------------

    @rule(path=PATH, method=st.sampled_from(sorted(NATIVE)), amount=AMOUNT, seed=SEED)
    def prune_native(self, path, method, amount, seed):
        self.count("prune_native")
        torch.manual_seed(seed)
        NATIVE[method](self.module(path), amount)
        self.moved(path)

    @rule(path=PATH, method=st.sampled_from(sorted(OURS)), amount=AMOUNT)
    def prune_ours(self, path, method, amount):
        self.count("prune_ours")
        self.refused(OURS[method], self.module(path), amount)
        self.fewer()

    @rule(method=st.sampled_from(sorted(GLOBAL)), amount=AMOUNT)
    def prune_globally(self, method, amount):
        self.count("prune_globally")
        params = [(self.module(path), "weight") for path in LAYERS]
        self.refused(GLOBAL[method], params, amount)
        self.moved(*LAYERS)

    def moved(self, *paths):
        """Note that a native call has moved the parameters of a module that was not pruned."""
        now = [name.removesuffix("_orig") for name, _ in self.model.named_parameters()]
        if any(type(module) is NonDynamicallyQuantizableLinear for module, _ in self.pruned()):
            tpe.refresh(self.model)  # what a module whose parent reads it needs, once, if it was pruned natively
        assert sorted(now) == sorted(self.order)
        assert [n for n in now if n.rpartition(".")[0] not in paths] == [
            n for n in self.order if n.rpartition(".")[0] not in paths
        ]
        self.order = now
        self.fewer()

    def fewer(self):
        """Check that what was dead is dead, and take the new masks for the truth."""
        masks, _ = values(self.model)
        for name, mask in self.masks.items():
            assert bool((masks[name] <= mask).all()), name
        self.masks = {name: mask.clone() for name, mask in masks.items()}

    # -- training ---------------------------------------------------------------------------------------------------

    @rule(which=st.integers(0, 1), seed=SEED)
    def train(self, which, seed):
        self.count("train")
        torch.manual_seed(seed)
        self.model.train()
        for _ in range(2):
            self.model.zero_grad()
            self.model(torch.randn(3, 4, 5, dtype=self.dtype)).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            before = self.model.head.bias.detach().clone()
            self.optimizers[which].step()
            assert not torch.equal(before, self.model.head.bias)

    @precondition(lambda self: self.pruned() and self.dtype == torch.float32)
    @rule()
    def compensate(self):
        self.count("compensate")
        params = [(m, n) for m, n in self.pruned() if m is not self.model.mix.out_proj]
        if params:
            self.refused(tpe.compensate, self.model, [(self.x, None)], params, progress=False)

    # -- copies -----------------------------------------------------------------------------------------------------

    @rule(seed=SEED)
    def copy(self, seed):
        self.count("copy")
        clone = tpe.copy_pruned(self.model)
        assert not storages(clone) & storages(self.model)
        assert list(clone.state_dict()) == list(self.model.state_dict())
        self.others = [*self.others[-1:], (clone, copy.deepcopy(clone.state_dict()))]
        torch.manual_seed(seed)
        with torch.no_grad():  # what happens to a copy does not happen to the original, nor to its copies
            for parameter in tpe.copy_pruned(clone).parameters():
                parameter.add_(1)

    @rule()
    def ema(self):
        self.count("ema")
        # an average goes by the order of parameters and buffers, so it is of a model that is pruned alike
        now = [[n for n, _ in (*m.named_parameters(), *m.named_buffers())] for m in (self.average, self.model) if m]
        if self.average is None or [n.removeprefix("module.") for n in now[0] if n != "n_averaged"] != now[1]:
            with tpe.copyable(self.model):
                self.average = AveragedModel(self.model)
        self.average.to(self.dtype).update_parameters(self.model)
        self.check(self.average.module)

    # -- saving and loading -----------------------------------------------------------------------------------------

    @rule(whole=st.booleans())
    def save(self, whole):
        self.count("save")
        file = io.BytesIO()
        torch.save(self.model.state_dict() if whole else tpe.dense_state_dict(self.model), file)
        file.seek(0)
        self.saved = torch.load(file, weights_only=True), whole
        self.of_saved = values(self.model)

    @precondition(lambda self: self.saved is not None)
    @rule(native=st.booleans())
    def load_into_another(self, native):
        self.count("load_into_another")
        state, whole = self.saved
        fresh = Network()
        if native:
            prune.random_unstructured(fresh.head, "weight", amount=0.5)
        had, _ = values(fresh)
        tpe.load_pruned_state_dict(fresh, state)
        masks, weights = self.of_saved
        for name, mask in values(fresh)[0].items():
            assert torch.equal(mask, (masks[name] if whole and name in masks else had[name]).float())
        assert not whole or set(masks) <= set(values(fresh)[0])
        for name, weight in values(fresh)[1].items():
            known = weight.is_floating_point() and ((whole and name in masks) or name not in had)
            assert not known or torch.equal(weight, weights[name].float())
        self.check(fresh)

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.count("load")
        state, whole = self.saved
        tpe.load_pruned_state_dict(self.model, state)
        if whole:
            self.masks |= {name: mask.to(self.dtype) for name, mask in self.of_saved[0].items()}

    @precondition(lambda self: self.saved is not None)
    @rule(which=SEED, how=st.sampled_from(["missing", "extra", "shape"]))
    def load_what_does_not_fit(self, which, how):
        self.count("load_what_does_not_fit")
        state = dict(self.saved[0])
        # torch itself fills in a missing num_batches_tracked where the state dict has no versions, as this copy
        keys = sorted(key for key in state if not key.endswith("num_batches_tracked"))
        key = keys[which % len(keys)]
        if how == "missing":
            del state[key]
        elif how == "extra":
            state[f"{key}s"] = state[key]
        else:
            state[key] = torch.ones(3, 3, 3)
        assert not self.refused(tpe.load_pruned_state_dict, self.model, state)

    # -- ending -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.pruned())
    @rule(which=SEED, end=st.sampled_from(["remove", "keep zeros", "undo", "native"]))
    def end(self, which, end):
        self.count("end")
        pruned = self.pruned()
        module, name = pruned[which % len(pruned)]
        path = next(path for path, each in self.model.named_modules() if each is module)
        weight = (module.weight_orig * module.weight_mask).detach()
        if end == "native":
            prune.remove(module, name)
        elif end == "undo":
            weight = module.weight_orig.detach().clone()
            tpe.undo(module, name)
        else:
            tpe.remove(module, name, keep_zeros=end == "keep zeros")
        assert torch.equal(module.weight, weight)
        del self.masks[f"{path}.weight"]
        if end == "native":
            self.moved(path)
        if end == "keep zeros" and self.kept is None:
            self.kept = [tpe.keep_zeros(self.model, optimizer) for optimizer in self.optimizers]

    @precondition(lambda self: self.kept is not None)
    @rule()
    def let_go(self):
        self.count("let_go")
        for handle in self.kept:
            handle.remove()
        self.kept = None
        for module in self.model.modules():
            module._buffers.pop("weight_zeros", None)
            module._non_persistent_buffers_set.discard("weight_zeros")

    # -- serving ----------------------------------------------------------------------------------------------------

    @rule()
    def refresh(self):
        self.count("refresh")
        tpe.refresh(self.model)
        for module, _ in self.pruned():
            assert torch.equal(module.weight, module.weight_orig * module.weight_mask)

    @precondition(lambda self: self.compiles < 2)  # it takes longer than all else
    @rule()
    def compile(self):
        self.count("compile")
        self.compiles += 1
        if self.compiled is None:
            torch._dynamo.reset()
            self.compiled = torch.compile(self.model, backend="eager")
        with torch.no_grad():
            got = self.compiled.eval()(self.x.to(self.dtype))
        close(got, self.expected(self.model.eval()))  # attention takes another way when compiled

    @rule(write=st.sampled_from(["none", "data", "in place", "step", "prune"]), path=PATH)
    def serve(self, write, path):
        self.count("serve")
        module = self.module(path)
        with tpe.frozen(self.model):
            self.check(self.model)
            if write == "data":
                dense(module).data.mul_(1.25)
            elif write == "in place":
                with torch.no_grad():
                    dense(module).mul_(1.25)
            elif write == "step":
                self.train(0, 0)
            elif write == "prune":
                self.prune_ours(path, "every_other", 0.2)
            self.check(self.model)
            self.check(self.model)

    @rule(dtype=FLOATS, back=st.booleans(), method=st.booleans())
    def change_dtype(self, dtype, back, method):
        self.count("change_dtype")
        self.model.half() if dtype == torch.float16 and method else self.model.to(dtype)
        self.check(self.model)
        if back:
            self.model.float()
        for optimizer in self.optimizers:
            optimizer.state.clear()  # torch does not convert it
        self.masks = {name: mask.to(self.dtype) for name, mask in self.masks.items()}

    @precondition(lambda self: self.dtype != torch.float32)
    @rule()
    def float_again(self):
        self.change_dtype(torch.float32, False, False)

    # -- what always holds ------------------------------------------------------------------------------------------

    def expected(self, model):
        """Return what a dense model of the effective weights says."""
        twin = Network().to(model.head.bias.dtype).train(model.training)
        twin.load_state_dict(values(model)[1])
        with torch.no_grad():
            return twin(self.x.to(model.head.bias.dtype))

    def check(self, model):
        mode, model = model.training, model.eval()
        with torch.no_grad():
            got = model(self.x.to(model.head.bias.dtype))
        close(got, self.expected(model))  # the order of sums may depend on where tensors lie
        for _, module, _ in tpe.pruned_parameters(model):
            assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
        model.train(mode)

    @invariant()
    def outputs_are_those_of_weights_times_masks(self):
        self.check(self.model)

    @invariant()
    def masks_do_not_change_by_themselves(self):
        masks, _ = values(self.model)
        assert set(masks) == set(self.masks)
        for name, mask in masks.items():
            assert torch.equal(mask, self.masks[name])
            assert mask.dtype == self.dtype or mask.dtype == torch.float32  # a native one may keep its own

    @invariant()
    def parameters_keep_name_order_and_identity(self):
        named = [(name.removesuffix("_orig"), parameter) for name, parameter in self.model.named_parameters()]
        assert [name for name, _ in named] == self.order
        assert all(self.objects[name] is parameter and parameter.requires_grad for name, parameter in named)
        assert all(type(parameter) is nn.Parameter for _, parameter in named)

    @invariant()
    def zeros_that_are_kept_are_zero_after_a_step(self):
        assert all(zeros.dtype == torch.bool for name, zeros in self.model.named_buffers() if name.endswith("_zeros"))

    @invariant()
    def copies_are_left_alone(self):
        for clone, state in self.others:
            assert all(torch.equal(now, state[name]) for name, now in clone.state_dict().items())
            assert not storages(clone) & storages(self.model)

    @invariant()
    def histories_are_readable_and_hold_no_tensors(self):
        for module, name in self.pruned():
            [hook] = [h for h in module._forward_pre_hooks.values() if getattr(h, "_tensor_name", None) == name]
            for entry in hook if isinstance(hook, prune.PruningContainer) else [hook]:
                assert type(entry).__name__ in repr(entry) or repr(entry).endswith(")")
                ours = not isinstance(entry, prune.CustomFromMask)
                assert not ours or not [v for v in vars(entry).values() if torch.is_tensor(v)]


thorough = settings.default.max_examples > 100
Life.TestCase.settings = settings(
    max_examples=300 if thorough else 25,
    stateful_step_count=60 if thorough else 20,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate] if not thorough else [Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


TestLife = Life.TestCase


@pytest.fixture(autouse=True, scope="module")
def _report():
    yield
    torch._dynamo.reset()
    print(dict(STATISTICS))
