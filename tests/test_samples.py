"""Which samples a statistic is about: their axis, what they share, and losses that are no mean over them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import torchprune_ext as tpe

calibration = tpe.calibration
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-14)
PER_SAMPLE = {
    "fisher": calibration.fisher,
    "taylor": calibration.taylor,
    "ggn": functools.partial(calibration.hessian_diagonal, samples=1),
}
PER_SAMPLE = {name: functools.partial(call, progress=False) for name, call in PER_SAMPLE.items()}
PER_BATCH = {
    "gradients": calibration.gradients,
    "taylor, batch": functools.partial(calibration.taylor, per="batch"),
    "hutchinson": functools.partial(calibration.hessian_diagonal, method="hutchinson", samples=2),
    "exact": functools.partial(calibration.hessian_diagonal, method="exact"),
    "snip": calibration.snip,
    "grasp": calibration.grasp,
}
PER_BATCH = {name: functools.partial(call, progress=False) for name, call in PER_BATCH.items()}
per_sample = pytest.mark.parametrize("call", PER_SAMPLE.values(), ids=PER_SAMPLE)
per_batch = pytest.mark.parametrize("call", PER_BATCH.values(), ids=PER_BATCH)
every = pytest.mark.parametrize("call", [*PER_SAMPLE.values(), *PER_BATCH.values()], ids=[*PER_SAMPLE, *PER_BATCH])
fisher = PER_SAMPLE["fisher"]


def squares(model, losses, tensor):
    """Mean square of the gradient of each of ``losses``, functions without arguments, by plain autograd."""
    model.eval()
    grads = [torch.autograd.grad(loss(), tensor)[0].square() for loss in losses]
    return torch.stack(grads).mean(0)


class TimeFirst(nn.Module):
    """A Transformer as torch builds it by default: ``(time, samples, features)``."""

    def __init__(self, pooled):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.pooled = nn.Linear(8, 3), pooled

    def forward(self, x):
        x = self.encoder(x)
        return self.head(x.mean(0) if self.pooled else x)


def token_loss(output, target):
    return F.cross_entropy(output.reshape(-1, 3), target.reshape(-1))


def time_first(pooled, length=5, size=4):
    torch.manual_seed(0)
    model = TimeFirst(pooled).double()
    shape = (size,) if pooled else (length, size)
    batches = [(torch.randn(length, size, 8).double(), torch.randint(3, shape)) for _ in range(2)]
    return model, batches, [(model.head, "weight"), (model.encoder.layers[0].linear1, "weight")]


@pytest.mark.parametrize(("pooled", "length"), [(False, 5), (True, 5), (True, 4), (False, 4)])
@pytest.mark.parametrize("call", [calibration.fisher, calibration.taylor], ids=["fisher", "taylor"])
def test_time_taken_for_samples_is_refused(call, pooled, length):
    model, batches, params = time_first(pooled, length)
    with pytest.raises(ValueError, match="sample_axes="):
        call(model, token_loss, batches, params, progress=False)


@pytest.mark.parametrize("pooled", [False, True])
def test_samples_may_stand_on_any_axis(pooled):
    model, batches, params = time_first(pooled)
    axes = (1, 0) if pooled else 1
    found = fisher(model, token_loss, batches, params, sample_axes=axes)

    def alone(x, y, i):
        return token_loss(model(x[:, i : i + 1]), y[i : i + 1] if pooled else y[:, i : i + 1])

    losses = [functools.partial(alone, x, y, i) for x, y in batches for i in range(4)]
    for module, name in params:
        close(found[module, name], squares(model, losses, getattr(module, name)))


@pytest.mark.parametrize("length", [4, 5])
def test_gauss_newton_needs_its_samples_on_the_first_axis_of_the_output(length):
    model, batches, params = time_first(False, length)
    with pytest.raises(ValueError, match="an output with a row per sample"):
        calibration.hessian_diagonal(model, token_loss, batches, params, sample_axes=1, progress=False)
    model, batches, params = time_first(True, length)
    found = calibration.hessian_diagonal(model, token_loss, batches, params, sample_axes=(1, 0), progress=False)
    flat = [(x[:, i : i + 1], y[i : i + 1]) for x, y in batches for i in range(4)]
    expected = calibration.hessian_diagonal(model, token_loss, flat, params, sample_axes=(1, 0), progress=False)
    for key in params:
        close(found[key], expected[key])


class Ignorant(nn.Linear):
    """Is handed more than it reads."""

    def forward(self, x, epoch, part, y=None):
        return super().forward(x)


class Counting(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_batches_of_one_sample_are_rehearsed_once():
    torch.manual_seed(0)
    model, data = Counting(4, 3), [(torch.randn(1, 4), torch.zeros(1).long()) for _ in range(20)]
    fisher(model, F.cross_entropy, data, [(model, "weight")])
    assert model.calls < 20 + 10


def test_strings_are_no_samples():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.arange(6) % 3
    loader = [(x, {"y": y, "names": list("abcdef"), "numbers": [1, 2]})]
    found = fisher(model, lambda out, targets: F.cross_entropy(out, targets["y"]), loader, [(model, "weight")])
    expected = fisher(model, F.cross_entropy, [(x, y)], [(model, "weight")])[model, "weight"]
    close(found[model, "weight"], expected)
    keywords = [{"x": x, "epoch": list("abcdef"), "part": [1.0] * 6, "y": y}]
    reads = Ignorant(4, 3)
    reads.load_state_dict(model.state_dict())
    found = fisher(reads, lambda out, batch: F.cross_entropy(out, batch["y"]), keywords, [(reads, "weight")])
    close(found[reads, "weight"], expected)


class Reader(nn.Module):
    """Reads tokens with positions, a mask between them and a scale that all samples share."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(11, 6), nn.Embedding(9, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, input_ids, position_ids=None, mask=None, scale=None, labels=None):
        x = self.words(input_ids)
        if position_ids is not None:
            x = x + self.places(position_ids)
        if mask is not None:
            x = mask.to(x) @ self.mix(x)
        logits = self.head(x if scale is None else x * scale)
        loss = None if labels is None else F.cross_entropy(logits.reshape(-1, 11), labels.reshape(-1))
        return {"loss": loss, "logits": logits}


def shared(size, length):
    """Return what samples may share, by name."""
    return {
        "position_ids": torch.arange(length)[None],
        "mask": torch.ones(length, length).tril().double(),
        "scale": torch.tensor(2.0).double(),
    }


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("names", [["position_ids"], ["mask"], ["scale"], ["scale", "position_ids", "mask"]])
def test_what_samples_share_is_seen(size, names):
    torch.manual_seed(0)
    model = Reader().double()
    batches = []
    for _ in range(2):
        ids = torch.randint(11, (size, 5))
        batches.append({**{name: shared(size, 5)[name] for name in names}, "input_ids": ids, "labels": ids})
    params = [(model.head, "weight"), (model.words, "weight")]
    found = fisher(model, lambda output, _: output["loss"], batches, params)

    def alone(batch, i):
        return model(**{k: v[i : i + 1] if k in ("input_ids", "labels") else v for k, v in batch.items()})["loss"]

    losses = [functools.partial(alone, batch, i) for batch in batches for i in range(size)]
    for module, name in params:
        close(found[module, name], squares(model, losses, getattr(module, name)))


def test_a_shared_mask_as_long_as_the_batch_is_refused_and_can_be_named():
    torch.manual_seed(0)
    model, ids = Reader().double(), torch.randint(11, (5, 5))
    batch = {"mask": shared(5, 5)["mask"], "input_ids": ids, "labels": ids}
    params = [(model.head, "weight")]
    with pytest.raises(ValueError, match="sample_axes="):
        fisher(model, lambda output, _: output["loss"], [batch], params)
    found = fisher(model, lambda output, _: output["loss"], [batch], params, sample_axes={"mask": None})
    losses = [
        lambda i=i: model(input_ids=ids[i : i + 1], labels=ids[i : i + 1], mask=batch["mask"])["loss"] for i in range(5)
    ]
    close(found[model.head, "weight"], squares(model, losses, model.head.weight))


def test_one_sample_is_not_read_off_shared_tensors():
    torch.manual_seed(0)
    model, ids = Reader().double(), torch.randint(11, (4, 5))
    places = torch.arange(5)[None]
    batch = {"position_ids": places, "scale": torch.ones(1, 1, 1).double(), "input_ids": ids}
    params = [(model.head, "weight")]

    def loss_fn(output, batch):
        return F.cross_entropy(output["logits"].reshape(-1, 11), batch["input_ids"].reshape(-1))

    with pytest.raises(ValueError, match="sample_axes="):
        fisher(model, loss_fn, [batch], params)
    axes = {"position_ids": None, "scale": None, "input_ids": 0}
    found = fisher(model, loss_fn, [batch], params, sample_axes=axes)
    losses = [lambda i=i: loss_fn(model(ids[i : i + 1], places), {"input_ids": ids[i : i + 1]}) for i in range(4)]
    close(found[model.head, "weight"], squares(model, losses, model.head.weight))


def test_a_batch_is_not_taken_for_one_sample_because_of_what_the_model_does_not_read():
    torch.manual_seed(0)
    model, x = Ignorant(4, 3), torch.randn(6, 4)
    batch = {"epoch": torch.tensor([3]), "part": torch.tensor([1]), "x": x}
    with pytest.raises(ValueError, match=r"one sample or several.*sample_axes="):
        fisher(model, lambda output, _: output.square().mean(), [batch], [(model, "weight")])


@per_sample
def test_batch_statistics_of_a_batch_are_refused(call):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    with pytest.raises(ValueError, match=r"for one of them alone differs|fails on some of them alone"):
        call(model, F.cross_entropy, batches, [(model[0], "weight")])


class Pairs(nn.Module):
    """Embeds two views of each sample, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, left, right):
        return F.normalize(self.left(left), dim=-1), F.normalize(self.right(right), dim=-1)


def contrastive(output, _):
    logits = 10 * output[0] @ output[1].T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("call", [calibration.fisher, calibration.taylor], ids=["fisher", "taylor"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_contrastive_loss_has_no_statistic_per_sample(call, size):
    torch.manual_seed(0)
    model = Pairs()
    loader = [((torch.randn(size, 4), torch.randn(size, 3)), None)]
    params = [(model.left, "weight")]
    with pytest.raises(ValueError, match="no mean over independent samples"):
        call(model, contrastive, loader, params, progress=False)
    if size > 1:
        assert calibration.gradients(model, contrastive, loader, params, progress=False)[params[0]].any()


def test_an_untrained_contrastive_loss_is_no_sum():
    torch.manual_seed(0)
    model = Pairs()
    loader = [((torch.ones(2, 4) + 1e-3 * torch.randn(2, 4), torch.ones(2, 3) + 1e-3 * torch.randn(2, 3)), None)]
    assert calibration.gradients(model, contrastive, loader, [(model.left, "weight")], progress=False)


@every
@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_sum_is_no_mean(call, size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(torch.randn(size, 4), torch.randint(3, (size,)))]
    with pytest.raises(ValueError, match=r"a sum over the samples: .*reduction='mean'"):
        call(model, functools.partial(F.cross_entropy, reduction="sum"), batches, [(model[0], "weight")])
    assert call(model, F.cross_entropy, batches, [(model[0], "weight")])


@per_batch
def test_flat_labels_cannot_be_repeated_but_serve_statistics_of_batches(call):
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11), nn.Tanh(), nn.Flatten(0, 1)), torch.arange(10)
    loader = [(ids.view(2, 5), ids)]
    assert call(model, F.cross_entropy, loader, [(model[1], "weight")])[model[1], "weight"].any()
    with pytest.raises(ValueError, match="targets do not have one entry each"):
        fisher(model, F.cross_entropy, loader, [(model[1], "weight")])


def padded(labels):
    torch.manual_seed(0)
    ids = torch.randint(11, labels.shape)
    return {"input_ids": ids, "labels": torch.where(labels, ids, -100)}


def test_a_mean_over_tokens_is_taken():
    model = Reader().double()
    lengths = torch.tensor([5, 3, 2, 4])
    batch = padded(torch.arange(5)[None] < lengths[:, None])
    found = fisher(model, lambda output, _: output["loss"], [batch], [(model.head, "weight")])
    losses = [lambda i=i: model(**{k: v[i : i + 1] for k, v in batch.items()})["loss"] for i in range(4)]
    close(found[model.head, "weight"], squares(model, losses, model.head.weight))


def test_weights_that_change_the_loss_are_told():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2), torch.randn(8, 4), torch.tensor([0, 0, 0, 1] * 2)
    loss_fn = nn.CrossEntropyLoss(torch.tensor([1.0, 30.0]))
    with pytest.warns(UserWarning, match="weighs samples differently"):
        fisher(model, loss_fn, [(x, y)], [(model, "weight")])


@pytest.mark.parametrize("lost", [1, 6])
@pytest.mark.parametrize("vectorized", [True, False])
def test_a_sample_without_labels_is_named(lost, vectorized, monkeypatch):
    if not vectorized:
        monkeypatch.setattr("torchprune_ext._runs.PER_SAMPLE", 1)
    model = Reader().double()
    batch = padded((torch.arange(8) != lost)[:, None].expand(8, 5))
    with pytest.raises(ValueError, match=rf"nan for sample {lost} of a batch.*\(-100\)"):
        fisher(model, lambda output, _: output["loss"], [batch], [(model.head, "weight")])
    assert calibration.gradients(model, lambda output, _: output["loss"], [batch], [(model.head, "weight")])


@every
def test_a_tensor_that_the_loss_does_not_feel_is_refused_by_name(call):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.zeros_(model[2].weight)  # so nothing comes back to the first layer
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    if call in (PER_BATCH["hutchinson"], PER_BATCH["exact"]):
        batches = [(torch.zeros(6, 4), batches[0][1])]
    with pytest.raises(ValueError, match=r"0\.weight, whose statistic is 0 in every entry"):
        call(model, F.cross_entropy, batches, [(model[0], "weight"), (model[2], "bias")])


@pytest.mark.parametrize("call", [calibration.taylor, calibration.snip, PER_BATCH["taylor, batch"]])
def test_weights_of_zero_are_worth_zero(call):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.bias)
    scores = call(
        model, F.cross_entropy, [(torch.randn(6, 4), torch.arange(6) % 3)], [(model, "bias"), (model, "weight")]
    )
    assert not scores[model, "bias"].any()


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_a_model_that_draws_random_numbers_is_not_taken_for_one_that_mixes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Noisy(), nn.Linear(5, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    assert fisher(model, F.cross_entropy, batches, [(model[0], "weight")])


class Detector(nn.Module):
    """Takes a list of images of any size, as the detection models of torchvision do."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(torch.stack([self.conv(image).mean((1, 2)) for image in images]))


def images(*sizes):
    return [torch.randn(3, size, size) for size in sizes]


def detect(output, targets):
    return F.cross_entropy(output, torch.stack([target["label"] for target in targets]))


def test_lists_of_images_are_counted_by_samples():
    torch.manual_seed(0)
    model = Detector()
    data = [
        (images(*sizes), [{"label": torch.tensor(i % 2)} for i in range(len(sizes))]) for sizes in ((5, 6, 7, 8), (9,))
    ]
    with pytest.raises(TypeError, match=r"a list of samples.*prepare=lambda batch: \(\(list\(batch\[0\]\),\)"):
        calibration.gradients(model, detect, data, [(model.head, "weight")], progress=False)
    options = {"prepare": lambda batch: ((list(batch[0]),), list(batch[1])), "progress": False}
    found = calibration.gradients(model, detect, data, [(model.head, "weight")], **options)
    flat = [(image, target) for pair in data for image, target in zip(*pair, strict=True)]
    loss = torch.stack([detect(model([image]), [target]) for image, target in flat]).mean()
    torch.testing.assert_close(found[model.head, "weight"], torch.autograd.grad(loss, model.head.weight)[0].abs())
    with pytest.raises(ValueError, match=r"list of samples.*prepare="):
        calibration.fisher(model, detect, data, [(model.head, "weight")], **options)
    unclear = [((images(5, 5),), torch.zeros(()))]
    with pytest.raises(ValueError, match=r"not clear whether each is a sample.*prepare="):
        calibration.gradients(model, lambda out, _: out.mean(), unclear, [(model.head, "weight")], progress=False)
    assert calibration.activations(model, [*unclear] * 2, [(model.head, "weight")], progress=False)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, packed):
        return self.head(self.lstm(packed)[1][0][-1])


def test_packed_sequences_are_samples():
    torch.manual_seed(0)
    model = Recurrent().double()
    rows = [torch.randn(length, 3).double() for length in (2, 4, 3, 1, 5)]
    packed, labels = pack_sequence(rows, enforce_sorted=False), torch.tensor([0, 1, 1, 0, 1])
    params = [(model.head, "weight"), (model.lstm, "weight_ih_l0")]
    with pytest.warns(UserWarning, match="PackedSequence"):
        found = fisher(model, F.cross_entropy, [(packed, labels)], params)
    losses = [lambda i=i: F.cross_entropy(model(pack_sequence([rows[i]])), labels[i : i + 1]) for i in range(5)]
    for module, name in params:
        close(found[module, name], squares(model, losses, getattr(module, name)))


@pytest.mark.parametrize(
    ("axes", "error", "message"),
    [
        ({"x": 0}, TypeError, "does not fit"),
        ((0, 0, 0), TypeError, "does not fit"),
        (1, ValueError, "does not have that|differ"),
        ((1, 0), ValueError, "differ"),
        ((5, 0), ValueError, "gives axis 5 for inputs"),
        ("first", TypeError, "does not fit"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, error, message):
    model = nn.Linear(4, 3)
    with pytest.raises(error, match=message):
        fisher(
            model, F.cross_entropy, [(torch.randn(6, 4), torch.zeros(6).long())], [(model, "weight")], sample_axes=axes
        )


class Centring(nn.Module):
    """Mixes the samples in one column of its outputs."""

    def forward(self, x):
        return torch.cat([x[:, :-1], x[:, -1:] - x[:, -1:].mean(0)], 1)


class Closing(nn.Module):
    """Rules the first class out."""

    def forward(self, x):
        return torch.cat([torch.full_like(x[:, :1], -torch.inf), x[:, 1:]], 1)


@per_sample
@pytest.mark.parametrize("last", [nn.Identity, Closing])
def test_one_output_that_mixes_samples_is_enough_to_refuse(call, last):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Centring(), last())
    batches = [(torch.randn(6, 4), torch.randint(1, 3, (6,)))]
    with pytest.raises(ValueError, match="alone differs from that in a batch"):
        call(model, F.cross_entropy, batches, [(model[0], "weight")])


def test_outputs_that_are_infinite_for_all_samples_do_not_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Closing())
    batches = [(torch.randn(6, 4), torch.randint(1, 3, (6,)))]
    assert fisher(model, F.cross_entropy, batches, [(model[0], "weight")])


def test_a_loss_of_zero_is_a_mean():
    model = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="whose statistic is 0 in every entry"):
        fisher(model, lambda output, _: F.relu(output - 99).mean(), [(torch.randn(6, 4), None)], [(model, "weight")])
