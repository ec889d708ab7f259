"""The network of the examples: the LeNet of the pruning chapter, how it is trained and how it is evaluated."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from digits import Digits, LabelledImages
from torch import Tensor, nn

T = TypeVar("T")

BATCH_SIZE = 32
EVALUATION_BATCH_SIZE = 1000
CHAPTER_AMOUNTS = {"conv1": 0.85, "conv2": 0.80, "fc1": 0.75, "fc2": 0.70, "fc3": 0.80}  # of each layer, in the chapter


class LeNet(nn.Module):
    """LeNet-5 as in the pruning chapter: two convolutions, three linear layers, 44,426 parameters.

    Args:
        batch_norm: put a BatchNorm behind every hidden layer (``bn_conv1``, ``bn_conv2``, ``bn_fc1``, ``bn_fc2``).
            Without it these are ``nn.Identity``, so the state dict is the plain LeNet's.
    """

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 4 * 4, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)
        self.bn_conv1 = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.bn_conv2 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.bn_fc1 = nn.BatchNorm1d(120) if batch_norm else nn.Identity()
        self.bn_fc2 = nn.BatchNorm1d(84) if batch_norm else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape (batch, 10), of ``images``, shape (batch, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.bn_conv1(self.conv1(images))), 2)
        x = F.max_pool2d(F.relu(self.bn_conv2(self.conv2(x))), 2)
        x = F.relu(self.bn_fc1(self.fc1(x.flatten(1))))
        x = F.relu(self.bn_fc2(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits


def new_network(seed: int, *, batch_norm: bool = False) -> LeNet:
    """Return a LeNet whose random weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LeNet(batch_norm=batch_norm)


def load_checkpoint(file: Path) -> LeNet:
    """Return the LeNet whose state dict is in ``file``."""
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {file}: expected the state dict of the chapter's LeNet")
    model = LeNet()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model


def dense_network(checkpoint: Path | None, digits: Digits, *, epochs: int, seed: int) -> LeNet:
    """Return the LeNet of ``checkpoint``, or else one trained here."""
    if checkpoint is not None:
        return load_checkpoint(checkpoint)
    if digits.train is None:
        raise FileNotFoundError("no training images in the MNIST folder: add them, or pass --checkpoint")
    model = new_network(seed)
    train(model, digits.train, epochs=epochs, seed=seed, title="training")
    return model


def train(
    model: nn.Module,
    data: LabelledImages,
    *,
    epochs: int,
    seed: int,
    lr: float = 0.01,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    title: str | None = None,
) -> None:
    """Train ``model`` in place by plain SGD with momentum; pruned weights stay pruned, as their hooks see to it.

    Args:
        model: the network; left in evaluation mode.
        data: training images.
        epochs: passes over ``data`` (count).
        seed: seeds the order of the images, without touching torch's global random state.
        lr: learning rate at the start; it falls linearly to a hundredth.
        penalty: added to the loss, a function of the model.
        title: shows a progress bar over the epochs under this title; needs tqdm.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    steps = epochs * math.ceil(len(data) / BATCH_SIZE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.01, total_iters=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs) if title is None else progress(range(epochs), title):
        for rows in torch.randperm(len(data), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
            if penalty is not None:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: LabelledImages) -> float:
    """Return the percentage of ``data`` that ``model`` gets right, in evaluation mode."""
    model.eval()
    batches = zip(data.images.split(EVALUATION_BATCH_SIZE), data.labels.split(EVALUATION_BATCH_SIZE), strict=True)
    correct = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in batches)
    return 100 * correct / len(data)


def progress(steps: Iterable[T], title: str) -> Iterable[T]:
    """Return ``steps`` with a progress bar on standard error.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("tqdm is not installed: pip install torchprune-ext[demo]") from error
    bar: Iterable[T] = tqdm(steps, desc=title, mininterval=1)
    return bar
