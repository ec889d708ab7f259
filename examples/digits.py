"""What the examples share: the LeNet of the pruning chapter, handwritten digits, training and evaluation.

Two sources of digits, both as normalised 28x28 images: scikit-learn's own (1,797 real digits that ship with that
package, so nothing is downloaded) and a folder with MNIST.
"""

import gzip
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = TypeVar("T")

MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels; the usual normalisation for this network
BATCH_SIZE = 32
EVALUATION_BATCH_SIZE = 1000


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


@dataclass(frozen=True)
class LabelledImages:
    """Normalised images, shape (count, 1, 28, 28), and their labels, shape (count,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def subset(self, count: int, seed: int) -> "LabelledImages":
        """Return ``count`` of them (or all, if there are fewer) in random order, the same for the same ``seed``."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return LabelledImages(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Digits:
    """A data set: its name, its training part (``None`` where a folder has none) and its test part."""

    name: str
    train: LabelledImages | None
    test: LabelledImages


def load_sklearn_digits() -> Digits:
    """Return scikit-learn's digits, scaled from 8x8 to 28x28, split once and for all into 75 % and 25 % by class.

    Returns:
        1,347 training and 450 test images.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("scikit-learn is not installed: pip install torchprune-ext[demo]") from error
    pixels, labels = load_digits(return_X_y=True)  # values from 0 to 16
    small = torch.from_numpy(pixels).float().div(16).view(-1, 1, 8, 8)
    images = F.interpolate(small, size=(28, 28), mode="bilinear")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    everything = _labelled(images, torch.from_numpy(labels))
    parts = [LabelledImages(everything.images[rows], everything.labels[rows]) for rows in (train, test)]
    return Digits("scikit-learn's digits", train=parts[0], test=parts[1])


def load_mnist(folder: Path) -> Digits:
    """Return the MNIST digits of ``folder``.

    Each part is taken from the first that exists: the IDX files ``<part>-images-idx3-ubyte`` and
    ``<part>-labels-idx1-ubyte``, plain or as ``.gz``, in the folder itself or in ``MNIST/raw`` (torchvision's layout);
    or ``<part>*.npz`` with the arrays ``x`` and ``y``. The parts are called ``train`` and ``t10k``.

    Args:
        folder: where the files are; nothing is downloaded.

    Returns:
        The digits; ``train`` is ``None`` where the folder has no training images.

    Raises:
        FileNotFoundError: the folder has no test images.
    """
    test = _load_part(folder, "t10k")
    if test is None:
        raise FileNotFoundError(
            f"no MNIST test images in {folder}: expected t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz) "
            "there or in its MNIST/raw, or t10k*.npz with the arrays x and y"
        )
    return Digits("MNIST", train=_load_part(folder, "train"), test=test)


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


def _labelled(images: Tensor, labels: Tensor) -> LabelledImages:
    """Return the two together; ``images`` hold values from 0 to 1 and get normalised."""
    return LabelledImages(((images - MEAN) / STD).contiguous(), labels.long())


def _load_part(folder: Path, part: str) -> LabelledImages | None:
    """Return the ``part`` ("train" or "t10k") of MNIST in ``folder``, or ``None`` if it is not there."""
    for place in (folder, folder / "MNIST" / "raw"):
        for suffix in ("", ".gz"):
            images = place / f"{part}-images-idx3-ubyte{suffix}"
            labels = place / f"{part}-labels-idx1-ubyte{suffix}"
            if images.is_file() and labels.is_file():
                return _from_bytes(_read_idx(images), _read_idx(labels))
    for file in sorted(folder.glob(f"{part}*.npz")):
        with np.load(file) as arrays:
            return _from_bytes(arrays["x"], arrays["y"])
    return None


def _read_idx(file: Path) -> np.ndarray:
    """Return the array of bytes in an IDX file: a zero, a zero, a type (8: bytes), the number of axes, their sizes."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is not an IDX file of bytes: it starts with {content[:4]!r}")
    axes = content[3]
    shape = np.frombuffer(content, dtype=">i4", count=axes, offset=4)
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


def _from_bytes(images: np.ndarray, labels: np.ndarray) -> LabelledImages:
    """Return images of bytes from 0 to 255, shape (count, 28, 28), with their labels."""
    return _labelled(torch.tensor(images).unsqueeze(1).float().div(255), torch.tensor(labels))
