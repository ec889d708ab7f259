"""What the scores from data cost on a ResNet-18 of 10 classes, at batch 32 of 3x64x64: seconds and memory.

The weights are random (no download), which changes neither. Seconds are processor time on one thread, in multiples of
a training step on the same batch. Memory is the rise of the peak in a fresh process, results included, and what of it
is beyond that of a training step, in multiples of the size of the listed tensors.
Run: ``python examples/benchmark_calibration.py [--batch 32] [--size 64]``.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import extra_megabytes, in_fresh_process
from torch import Tensor, nn
from torchvision.models import resnet18

import torchprune_ext as tpe
from torchprune_ext import calibration

CLASSES = 10
STEP = "training step"

Params = list[tuple[nn.Module, str]]


class Setting:
    """A network with random weights, all its weights to prune, and one batch."""

    def __init__(self, batch: int, size: int) -> None:
        torch.manual_seed(0)
        self.model = resnet18(num_classes=CLASSES)
        self.params = tpe.prunable_parameters(self.model)
        self.images, self.labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))

    def step(self) -> None:
        """Train for one step; the gradients stay."""
        self.model.train()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        torch.optim.SGD(self.model.parameters(), lr=1e-3).step()

    def run(self, function: Callable[..., object], **options: object) -> object:
        """Return what a ``function`` of ``torchprune_ext.calibration`` finds on the batch."""
        data = [(self.images, self.labels)]
        return function(self.model, F.cross_entropy, data, self.params, progress=False, **options)

    def flow(self, steps: int) -> object:
        """Return the scores of SynFlow, which has no use for the data."""
        return calibration.synflow(self.model, self.images[:1], self.params, target_sparsity=0.9, steps=steps)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return the training step and all statistics."""
        hessian = calibration.hessian_diagonal
        model, data, params = self.model, [(self.images, self.labels)], self.params
        return {
            STEP: self.step,
            "gradients": lambda: self.run(calibration.gradients),
            "taylor, per batch": lambda: self.run(calibration.taylor, per="batch"),
            "taylor, per sample": lambda: self.run(calibration.taylor),
            "fisher": lambda: self.run(calibration.fisher),
            "hessian, ggn, exact": lambda: self.run(hessian),
            "hessian, ggn, 1 probe": lambda: self.run(hessian, samples=1),
            "hessian, hutchinson, 1 probe": lambda: self.run(hessian, method="hutchinson", samples=1),
            "hessian, hutchinson, 10 probes": lambda: self.run(hessian, method="hutchinson", samples=10),
            "activations": lambda: calibration.activations(model, data, params, progress=False),
            "snip": lambda: self.run(calibration.snip),
            "grasp": lambda: self.run(calibration.grasp),
            "synflow, 10 rounds": lambda: self.flow(10),
            "random": lambda: calibration.random(params),
        }

    def megabytes(self) -> float:
        """Return the size of the listed tensors."""
        tensors: list[Tensor] = [module.get_parameter(name) for module, name in self.params]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def measure(call: str, batch: int, size: int) -> None:
    """Print the seconds and the extra peak memory of one call; run in a process of its own."""
    Setting(2, 32).calls()[call]()  # load what loads late
    chosen = Setting(batch, size).calls()[call]
    start = time.process_time()
    megabytes = extra_megabytes(chosen)
    print(time.process_time() - start, megabytes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--measure", metavar="CALL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.measure:
        measure(options.measure, options.batch, options.size)
        return

    setting = Setting(2, 32)
    sizes = ("--batch", str(options.batch), "--size", str(options.size))
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, 1 thread, float32; ResNet-18, batch of "
        f"{options.batch} images of 3x{options.size}x{options.size}; {len(setting.params)} tensors of "
        f"{setting.megabytes():.1f} MB in all"
    )
    print(f"\n{'':<32}{'seconds':>9}{'steps':>8}{'memory':>12}{'beyond a step':>15}{'in tensors':>12}")
    step_seconds = step_megabytes = 0.0
    for call in setting.calls():
        output = in_fresh_process(__file__, *sizes, "--measure", call)
        seconds, megabytes = map(float, output.split())
        if call == STEP:
            step_seconds, step_megabytes = seconds, megabytes
        beyond = megabytes - step_megabytes
        print(
            f"{call:<32}{seconds:>9.2f}{seconds / step_seconds:>8.1f}{megabytes:>9.0f} MB{beyond:>12.0f} MB"
            f"{beyond / setting.megabytes():>12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
