"""When to prune: the chapter's LeNet, pruned after, while and before it is trained, to the same sparsities.

    python examples/lenet_timing.py --mnist DIR --checkpoint model.pt

After training, from the dense network: once and then 5 epochs; gradually over the same 5 epochs; with amounts chosen
by a sensitivity scan; and re-fitted before the epochs. All but the first have the dense network as their teacher. From
scratch: a lottery ticket of 5 rounds, masks that move while training (RigL and SET), and criteria for before training.
Accuracy in percent of the test images, mean
and spread of the seeds. The learning rate of each way is the one with the best accuracy on training digits that are not
trained on; the test images choose nothing. Without ``--mnist`` and ``--checkpoint`` it takes scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import LabelledImages, load_mnist, load_sklearn_digits
from lenet import CHAPTER_AMOUNTS, LeNet, accuracy, dense_network, new_network, progress
from torch import Tensor, nn

import torchprune_ext as tpe
from torchprune_ext import calibration

BATCH, HELD_OUT, CALIBRATION = 32, 0.15, 2_000
EPOCHS, SCRATCH_EPOCHS, ROUNDS, ROUND_EPOCHS = 5, 15, 5, 5
RATES = (0.01, 0.03)
EVERY = 100  # steps from one move of the masks to the next
SHIFT = 2  # pixels, at most, that training images are moved by
SPARSITIES = (0.7387, 0.90)  # the first is what the chapter's amounts leave of all parameters


class Shuffled:
    """Batches in another order, and of images moved otherwise, each time they are read; the same for the same seed."""

    def __init__(self, data: LabelledImages, seed: int) -> None:
        self.data, self.generator = data, torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.data) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels."""
        for rows in torch.randperm(len(self.data), generator=self.generator).split(BATCH):
            down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=self.generator).tolist()
            yield self.data.images[rows].roll((down, right), (2, 3)), self.data.labels[rows]


class Both:
    """Lets a pruner and the decay of the learning rate go on by one step."""

    def __init__(self, *parts: object) -> None:
        self.parts = [part for part in parts if part is not None]

    def step(self) -> None:
        """Go on by one step."""
        for part in self.parts:
            part.step()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Task:
    """The dense network, and digits to train on, to choose by, and to report on."""

    dense: LeNet
    train: LabelledImages
    held_out: LabelledImages
    test: LabelledImages

    def copy(self) -> tuple[LeNet, list[tuple[nn.Module, str]]]:
        """Return a copy of the dense network and its five weights."""
        model = tpe.copy_pruned(self.dense)
        return model, weights(model)

    def sample(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """Return batches of some training digits."""
        some = self.train.subset(CALIBRATION, seed)
        return list(zip(some.images.split(500), some.labels.split(500), strict=True))


def weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the five weights."""
    return [(model.get_submodule(path), "weight") for path in CHAPTER_AMOUNTS]


def tune(
    model: nn.Module,
    task: Task,
    seed: int,
    rate: float,
    epochs: int = EPOCHS,
    pruned_by: Callable[[nn.Module, torch.optim.Optimizer], object] | None = None,
    *,
    taught: bool = True,
) -> None:
    """Train in place, with a learning rate that falls to nothing; what ``pruned_by`` returns prunes meanwhile."""
    loader = Shuffled(task.train, seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * len(loader))
    pruner = None if pruned_by is None else pruned_by(model, optimizer)
    teacher = task.dense if taught else None
    tpe.fine_tune(model, loader, F.cross_entropy, optimizer, epochs, Both(pruner, decay), teacher, progress=False)


# --- the ways: from the dense network ----------------------------------------------------------------


def one_shot(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Prune by magnitude, then train."""
    model, params = task.copy()
    tpe.prune_to(params, sparsity)
    tune(model, task, seed, rate)
    return model


def untaught(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Do the same without a teacher."""
    model, params = task.copy()
    tpe.prune_to(params, sparsity)
    tune(model, task, seed, rate, taught=False)
    return model


def gradual(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Prune while training, in the first three of the five epochs."""
    model, _ = task.copy()
    steps = len(Shuffled(task.train, seed))
    schedule = tpe.schedules.cubic(0, 3 * steps, steps // 10, initial=sparsity / 2, final=sparsity)
    tune(model, task, seed, rate, EPOCHS, lambda model, _: tpe.GradualPruner(model, weights(model), schedule))
    return model


def by_sensitivity(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Prune each layer as far as one common drop allows, then train."""
    model, params = task.copy()
    curve = tpe.allocation.sensitivity(
        model, lambda pruned: accuracy(pruned, task.held_out), params, (0.5, 0.7, 0.8, 0.9, 0.95), progress=False
    )
    amounts = tpe.allocation.from_sensitivity(curve, target_sparsity=sparsity, max_drop=100.0)
    tpe.prune_to(params, amounts)
    tune(model, task, seed, rate)
    return model


def compensated(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Prune in rounds by Fisher information, re-fit, then train."""
    model, params = task.copy()
    loader = task.sample(seed)

    def score(pruned: nn.Module) -> Scores:
        fisher = calibration.fisher(pruned, F.cross_entropy, loader, weights(pruned), progress=False)
        return {key: value * getattr(*key).detach().square() for key, value in fisher.items()}

    tpe.prune_in_rounds(model, loader, params, score, target_sparsity=sparsity, steps=5, progress=False)
    tune(model, task, seed, rate)
    return model


# --- the ways: from scratch --------------------------------------------------------------------------


def ticket(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
    """Train, prune and rewind in rounds, then train what is left."""
    model = new_network(seed)
    found = tpe.LotteryTicket(model, weights(model))
    for _ in range(ROUNDS):
        tune(model, task, seed, rate, ROUND_EPOCHS, taught=False)
        found.prune(1 - (1 - sparsity) ** (1 / ROUNDS))
        found.rewind()
    tune(model, task, seed, rate, SCRATCH_EPOCHS, taught=False)
    return model


Scores = dict[tuple[nn.Module, str], Tensor]
Way = Callable[[Task, float, int, float], LeNet]


def snip(model: nn.Module, task: Task, sparsity: float, seed: int) -> Scores:
    """Return the sensitivity of the loss before training."""
    return calibration.snip(model, F.cross_entropy, task.sample(seed), weights(model), progress=False)


def synflow(model: nn.Module, task: Task, sparsity: float, seed: int) -> Scores:
    """Return how many rounds each weight survives by synaptic flow."""
    return calibration.synflow(model, task.train.images[:1], weights(model), target_sparsity=sparsity)


def random(model: nn.Module, task: Task, sparsity: float, seed: int) -> Scores:
    """Return random numbers."""
    return calibration.random(weights(model), generator=torch.Generator().manual_seed(seed))


def before(score: Callable[[nn.Module, Task, float, int], Scores]) -> Way:
    """Return the way that prunes a new network by ``score``, and then trains it."""

    def way(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
        model = new_network(seed)
        tpe.prune_to(weights(model), sparsity, score(model, task, sparsity, seed))
        tune(model, task, seed, rate, SCRATCH_EPOCHS, taught=False)
        return model

    return way


def moving(growth: str) -> Way:
    """Return the way that trains a new network under masks that move, of shares as RigL's authors advise."""

    def way(task: Task, sparsity: float, seed: int, rate: float) -> LeNet:
        model = new_network(seed)
        end = round(0.75 * SCRATCH_EPOCHS * len(Shuffled(task.train, seed)))
        amounts = tpe.allocation.erk(weights(model), sparsity)

        def pruner(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
            return tpe.DynamicSparse(
                model, weights(model), amounts, growth, every=EVERY, end=end, optimizer=optimizer, seed=seed
            )

        tune(model, task, seed, rate, SCRATCH_EPOCHS, pruner, taught=False)
        return model

    return way


AFTER = {
    "once, then 5 epochs, no teacher": untaught,
    "once, then 5 epochs": one_shot,
    "gradually in 5 epochs": gradual,
    "by sensitivity, then 5 epochs": by_sensitivity,
    "re-fitted, then 5 epochs": compensated,
}
FROM_SCRATCH = {
    "lottery ticket, 5 rounds": ticket,
    "RigL": moving("gradient"),
    "SET": moving("random"),
    "SNIP before training": before(snip),
    "SynFlow before training": before(synflow),
    "random before training": before(random),
}


# --- the table ---------------------------------------------------------------------------------------


def counted(mask: Tensor) -> tuple[int, int]:
    """Return how many entries of ``mask`` are 0, and how many there are."""
    return int((mask == 0).sum()), mask.numel()


def measured(task: Task, way: Way, sparsity: float, seeds: int) -> str:
    """Return what ``way`` has reached with the learning rate that the held-out digits like best."""
    start = time.perf_counter()
    first = {rate: way(task, sparsity, 0, rate) for rate in RATES}
    rate = max(RATES, key=lambda rate: accuracy(first[rate], task.held_out))
    models = [first[rate], *(way(task, sparsity, seed, rate) for seed in range(1, seeds))]
    for model in models:
        masks = [getattr(module, f"{name}_mask") for module, name in weights(model)]
        gone, total = (sum(int(count) for count in counts) for counts in zip(*map(counted, masks), strict=True))
        if gone != round(sparsity * total):
            raise RuntimeError(f"{gone} of {total} weights are pruned, not {sparsity:.2%}")
    found = [accuracy(model, task.test) for model in models]
    spread = statistics.stdev(found) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.2f} +- {spread:.2f} ({rate:g}, {time.perf_counter() - start:.0f} s)"


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="read MNIST from here, not scikit-learn's digits")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="state dict of a trained LeNet; do not train")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--only", metavar="WORD", default="", help="only ways whose names have this word")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    """Load or train, and print the table."""
    torch.set_num_threads(arguments.threads)
    digits = load_mnist(arguments.mnist) if arguments.mnist else load_sklearn_digits()
    if digits.train is None:
        raise FileNotFoundError(f"no training images in {arguments.mnist}")
    dense = dense_network(arguments.checkpoint, digits, epochs=20, seed=0)
    known = digits.train.subset(len(digits.train), 0)
    count = round((1 - HELD_OUT) * len(known))
    train = LabelledImages(known.images[:count], known.labels[:count])
    task = Task(dense, train, LabelledImages(known.images[count:], known.labels[count:]), digits.test)
    print(
        f"dense LeNet: {accuracy(dense, digits.test):.2f} % of the {len(digits.test):,} {digits.name} test images right"
        f"\ntrained on {count:,} digits; learning rates chosen from {RATES} by {len(known) - count:,} others\n"
    )
    print(f"{'':<34}" + "".join(f"{f'{sparsity:.2%} of the weights':>32}" for sparsity in SPARSITIES))
    ways = {name: way for name, way in {**AFTER, **FROM_SCRATCH}.items() if arguments.only in name}
    for name, way in progress(ways.items(), "ways"):
        cells = "".join(f"{measured(task, way, sparsity, arguments.seeds):>32}" for sparsity in SPARSITIES)
        print(f"{name:<34}{cells}", flush=True)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
