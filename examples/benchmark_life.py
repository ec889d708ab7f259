"""What pruning costs in evaluation, and what keeping zeros costs in training.

Times alternate within one run, and each ratio is the median of the ratios of neighbours.

Run it with ``python examples/benchmark_life.py``; it takes a minute or two. The second part needs torchvision.
"""

import argparse
import statistics
import time

import torch
from torch import nn
from torch.nn.utils import prune

import torchprune_ext as tpe


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratios(calls, rounds):
    """Return the time of the first call, and the median ratio of each to it, measured side by side."""
    for call in calls.values():
        call()
    rows = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    first = next(iter(calls))
    return statistics.median(row[first] for row in rows), {
        name: statistics.median(row[name] / row[first] for row in rows) for name in calls
    }


def serving(size, batch, rounds):
    dense, native, ours = (nn.Linear(size, size).eval() for _ in range(3))
    prune.l1_unstructured(native, "weight", amount=0.9)
    tpe.global_unstructured([(ours, "weight")], 0.9)
    x = torch.randn(batch, size)
    with torch.no_grad():
        base, plain = ratios({"dense": lambda: dense(x), "native": lambda: native(x), "ours": lambda: ours(x)}, rounds)
        with tpe.frozen(native), tpe.frozen(ours):
            _, frozen = ratios(
                {"dense": lambda: dense(x), "native": lambda: native(x), "ours": lambda: ours(x)}, rounds
            )
    print(
        f"Linear {size}, batch {batch:2}: dense {base * 1e3:6.2f} ms; times dense: native {plain['native']:.2f}, ours "
        f"{plain['ours']:.2f}; frozen: native {frozen['native']:.2f}, ours {frozen['ours']:.2f}"
    )


def writing(size):
    layer = prune.l1_unstructured(nn.Linear(size, size).eval(), "weight", amount=0.9)
    x = torch.randn(1, size)
    with tpe.frozen(layer), torch.no_grad():
        before = layer(x) - layer.bias
        layer.weight_orig.data.mul_(2)
        seen = torch.allclose(layer(x) - layer.bias, 2 * before)
    print(f"a write through .data in the scope: {'seen at the next forward' if seen else 'NOT SEEN'}")
    memory = layer.weight_orig.data
    try:
        with tpe.frozen(layer), torch.no_grad():
            layer(x)
            memory.mul_(2)
        print("a write through memory handed out before: NOT SEEN")
    except RuntimeError as error:
        print(f"a write through memory handed out before: {error}")


def training(batch, pixels, rounds):
    import torchvision

    steps = {}
    for name in ("plain", "kept"):
        torch.manual_seed(0)
        model = torchvision.models.resnet18()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        tpe.global_unstructured(tpe.prunable_parameters(model), 0.9)
        tpe.remove_all(model, keep_zeros=True)
        if name == "kept":
            tpe.keep_zeros(model, optimizer)
        images, labels = torch.randn(batch, 3, pixels, pixels), torch.randint(1000, (batch,))

        def step(model=model, optimizer=optimizer, images=images, labels=labels):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        steps[name] = step
    base, ratio = ratios(steps, rounds)
    print(
        f"ResNet-18, batch {batch}, {pixels} x {pixels}: a step {base * 1e3:.0f} ms; keep_zeros "
        f"{(ratio['kept'] - 1) * 100:+.1f} %"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31, help="of the forward passes; a third of it for training")
    parser.add_argument("--pixels", type=int, default=224, help="size of the images")
    arguments = parser.parse_args()
    for batch in (1, 16):
        serving(4096, batch, arguments.rounds)
    writing(4096)
    training(32, arguments.pixels, max(arguments.rounds // 3, 3))


if __name__ == "__main__":
    main()
