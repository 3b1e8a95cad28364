"""Cost and savings of stochastic depth, as ratios measured in one run.

python benchmarks/stochastic_depth.py absent     block method, relative to a network built without the dropped blocks
python benchmarks/stochastic_depth.py methods    time saved by the block and the sample method
python benchmarks/stochastic_depth.py kernels    time that half of the rows saves in the convolutions alone
python benchmarks/stochastic_depth.py rows       ways to choose the rows of the sample method
python benchmarks/stochastic_depth.py inference  evaluation, folded and unfolded, relative to torchvision
python benchmarks/stochastic_depth.py memory     bytes saved for the backward pass by the sample method
python benchmarks/stochastic_depth.py plans      drawing a plan for 1,202 layers
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

import etude.functional as cf
from etude.algorithms.stochastic_depth import draws as draws_module
from etude.algorithms.stochastic_depth.plan import DropPlan
from interleaved import time_in_turns, trimmed_mean

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(channels_last: bool = False) -> nn.Module:
    """A ResNet-50 for ten classes."""
    torch.manual_seed(0)
    model = resnet50(num_classes=10).to(DEVICE)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def data(batch_size: int = 32, size: int = 64) -> tuple[Tensor, Tensor]:
    """A random batch."""
    return torch.randn(batch_size, 3, size, size, device=DEVICE), torch.randint(0, 10, (batch_size,), device=DEVICE)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Forward, backward and an SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def absent(rounds: int) -> None:
    """Block method with chosen blocks dropped, against the network without these blocks."""
    x, y = data()
    for dropped in ([15], [5, 9, 14], [2, 4, 6, 8, 10, 12, 14, 15]):
        model = cf.apply_stochastic_depth(network(), drop_rate=0.5)
        plan = cf.stochastic_blocks(model)[0].drop_plan
        plan.decide([index in dropped for index in range(16)])
        plan.draw = lambda *args, **kwargs: None  # type: ignore[method-assign]  # the same drops in every step
        without = network()
        names = [name for name, module in without.named_modules() if name.count(".") == 1 and name.startswith("layer")]
        for index in dropped:
            stage, place = names[index].split(".")
            getattr(without, stage)[int(place)] = nn.Identity()
        steps = {"dropped": training_step(model, x, y), "absent": training_step(without, x, y)}
        seconds = time_in_turns(steps, rounds)
        ratio = trimmed_mean(seconds["dropped"]) / trimmed_mean(seconds["absent"])
        middle = statistics.median(a / b for a, b in zip(seconds["dropped"], seconds["absent"], strict=True))
        print(f"{len(dropped)} of 16 blocks: dropped / absent = {ratio:.3f} (median of pairs {middle:.3f})")


def methods(rounds: int, size: int) -> None:
    """Time that both methods save at the same rates, on images of `size` by `size`."""
    x, y = data(size=size)
    for channels_last in (False, True):
        for rate in (0.2, 0.5):
            steps = {"plain": training_step(network(channels_last), x, y)}
            for method in ("block", "sample"):
                for draws in ("independent", "balanced"):
                    model = network(channels_last)
                    cf.apply_stochastic_depth(model, stochastic_method=method, drop_rate=rate, draws=draws)
                    steps[f"{method} {draws}"] = training_step(model, x, y)
            seconds = {name: trimmed_mean(values) for name, values in time_in_turns(steps, rounds).items()}
            saved = {name: 1 - value / seconds["plain"] for name, value in seconds.items()}
            layout = "channels-last" if channels_last else "contiguous"
            print(f"drop_rate {rate} linear, {layout}, {size}x{size}: plain takes {1e3 * seconds['plain']:.0f} ms")
            for name in list(steps)[1:]:
                share = saved[name] / saved["block balanced"]
                print(f"  {name:20} saves {saved[name]:6.1%} of the step, {share:5.0%} of block balanced", flush=True)


def kernels(rounds: int, size: int) -> None:
    """What the convolutions of half the rows save, of what leaving them out saves: a bound for the sample method."""
    for channels_last in (False, True):
        blocks = [block for block in network(channels_last).modules() if isinstance(block, Bottleneck)]
        steps = {
            (place, num_rows): _convolutions_step(block, place, num_rows, size, channels_last)
            for place, block in enumerate(blocks)
            for num_rows in (16, 32)
        }
        seconds = {key: statistics.median(values) for key, values in time_in_turns(steps, rounds).items()}
        rates = [0.5 * (place + 1) / len(blocks) for place in range(len(blocks))]
        by_block = sum(rate * seconds[place, 32] for place, rate in enumerate(rates))
        by_sample = sum(2 * rate * (seconds[place, 32] - seconds[place, 16]) for place, rate in enumerate(rates))
        print(f"{'channels-last' if channels_last else 'contiguous'}, {size}x{size}, 0.5 linear:")
        for stage, places in enumerate((range(3), range(3, 7), range(7, 13), range(13, 16)), start=1):
            half, whole = (sum(seconds[place, num_rows] for place in places) for num_rows in (16, 32))
            print(f"  layer{stage}: {1e3 * whole:.1f} ms, half the rows save {1 - half / whole:.0%}")
        print(f"  all: sample can save at most {by_sample / by_block:.0%} of what block saves")


def _convolutions_step(
    block: Bottleneck, place: int, num_rows: int, size: int, channels_last: bool
) -> Callable[[], None]:
    """Forward and backward of each convolution of a block separately."""
    stage = sum(place >= first for first in (3, 7, 13))
    size_out = -(-size // (4 * 2**stage))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    convolutions = [block.conv1, block.conv2, block.conv3]
    inputs, gradients = [], []
    for convolution in convolutions:
        size_in = size_out * 2 if place in (3, 7, 13) and convolution is not block.conv3 else size_out
        x = torch.randn(num_rows, convolution.in_channels, size_in, size_in, device=DEVICE)
        inputs.append(x.contiguous(memory_format=memory_format).requires_grad_())
        with torch.no_grad():
            gradients.append(torch.randn_like(convolution(inputs[-1])))

    def step() -> None:
        for convolution, x, gradient in zip(convolutions, inputs, gradients, strict=True):
            x.grad = convolution.weight.grad = None
            convolution(x).backward(gradient)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def rows(rounds: int) -> None:
    """Ways to choose the rows for the sample method at 0.5 linear."""
    x, y = data()
    quarters = draws_module.balanced_rows

    def windows_of_any_length(rates: np.ndarray, num_rows: int, own: Any, shared: Any) -> np.ndarray:
        kept = np.floor(num_rows * (1 - rates) + shared.random(len(rates)))
        offsets = np.floor(num_rows * own.random(len(rates)))
        return (np.arange(num_rows) - offsets[:, None]) % num_rows < kept[:, None]

    def random_rows(rates: np.ndarray, num_rows: int, own: Any, shared: Any) -> np.ndarray:
        kept = np.floor(num_rows * (1 - rates) + shared.random(len(rates)))
        return np.argsort(own.random((len(rates), num_rows)), axis=1) < kept[:, None]

    def with_rows(choose: Callable[..., np.ndarray]) -> Callable[[], None]:
        model = cf.apply_stochastic_depth(network(), stochastic_method="sample", drop_rate=0.5, draws="balanced")
        step = training_step(model, x, y)

        def run() -> None:
            draws_module.balanced_rows = choose
            step()

        return run

    block = cf.apply_stochastic_depth(network(), drop_rate=0.5, draws="balanced")
    steps = {
        "plain": training_step(network(), x, y),
        "block": training_step(block, x, y),
        "random rows, any number": with_rows(random_rows),
        "cyclic windows, any length": with_rows(windows_of_any_length),
        "cyclic windows of quarters": with_rows(quarters),
    }
    seconds = {name: trimmed_mean(values) for name, values in time_in_turns(steps, rounds).items()}
    draws_module.balanced_rows = quarters
    for name in list(steps)[1:]:
        print(f"{name:28} saves {1 - seconds[name] / seconds['plain']:6.1%} of the step")


def inference(rounds: int) -> None:
    """Evaluation time of a folded and an unfolded network, relative to torchvision's."""
    x, _ = data()
    unfolded = cf.apply_stochastic_depth(network(), drop_rate=0.2).eval()
    folded = cf.fold_stochastic_depth(copy.deepcopy(unfolded))

    def evaluate(model: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                model(x)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return step

    steps = {"torchvision": evaluate(network().eval()), "folded": evaluate(folded), "unfolded": evaluate(unfolded)}
    seconds = time_in_turns(steps, rounds)
    for name in ("folded", "unfolded"):
        middle = statistics.median(a / b for a, b in zip(seconds[name], seconds["torchvision"], strict=True))
        ratio = trimmed_mean(seconds[name]) / trimmed_mean(seconds["torchvision"])
        print(f"{name} / torchvision = {ratio:.3f} (median of pairs {middle:.3f})")


def memory(rounds: int) -> None:
    """Bytes saved for the backward pass, compared with the share of dropped rows."""
    x, y = data()

    def saved_bytes(model: nn.Module) -> int:
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = F.cross_entropy(model(x), y)
        del loss
        return sum(storages.values())

    plain = saved_bytes(network())
    print(f"plain: {plain / 2**20:.0f} MiB")
    for rate in (0.25, 0.5, 0.75):
        model = cf.apply_stochastic_depth(
            network(), stochastic_method="sample", drop_rate=rate, drop_distribution="uniform", draws="balanced"
        )
        saving = statistics.mean(1 - saved_bytes(model) / plain for _ in range(max(rounds // 5, 3)))
        share = cf.expected_savings(model, (3, 64, 64)).share("activation_bytes", [rate] * 16)
        print(f"sample at {rate} uniform: {saving:.1%} less, the rows dropped account for {share:.1%}")


def plans(rounds: int) -> None:
    """Drawing a plan for 1,202 layers."""
    for method in ("block", "sample"):
        for draws in ("independent", "balanced"):
            plan = DropPlan([0.5 * layer / 1202 for layer in range(1, 1203)], method=method, draws=draws)
            seconds = []
            for step in range(50 * rounds):
                started = time.perf_counter()
                plan.draw(step, num_rows=32)
                seconds.append(time.perf_counter() - started)
            print(f"{method} {draws}: {1e6 * statistics.median(seconds):.0f} us per step")


MEASUREMENTS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (absent, methods, kernels, rows, inference, memory, plans)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--rounds", type=int, default=40, help="how often each variant is timed")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images (methods and kernels)")
    arguments = parser.parse_args()
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    of_size = {"size": arguments.size} if arguments.measurement in ("methods", "kernels") else {}
    MEASUREMENTS[arguments.measurement](arguments.rounds, **of_size)
