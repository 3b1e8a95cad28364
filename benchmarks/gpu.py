"""Training speed on the accelerator of this machine, as ratios measured in one run; writes docs/benchmarks-gpu.md.

python benchmarks/gpu.py           ResNet-50/101/152, ViT-S/16 and ConvNeXt-T at 224 px, bf16, channels-last
python benchmarks/gpu.py --quick   small networks and images, on any machine, to try the command
"""

import argparse
import datetime
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import convnext_tiny
from tqdm import tqdm

import etude.functional as cf
from etude import Trainer
from etude.algorithms import StochasticDepth
from etude.models import ComposerClassifier
from interleaved import time_in_turns

Step = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        name: Of the network in timm.
        rates: Drop rates, linear over depth; for a network with its own drop paths also theirs.
        size: Height and width of the images.
        batch_size: Number of images in a step.
        options: For the network.
    """

    name: str
    rates: tuple[float, ...]
    size: int = 224
    batch_size: int = 128
    options: tuple[tuple[str, Any], ...] = ()


FULL = (
    Setting("resnet50", (0.1, 0.2)),
    Setting("resnet101", (0.4,)),
    Setting("resnet152", (0.5,)),
    Setting("vit_small_patch16_224", (0.1, 0.4)),
    Setting("convnext_tiny", (0.1, 0.4)),
)
QUICK = (
    Setting("resnet18", (0.5,), 32, 4),
    Setting(
        "vit_tiny_patch16_224", (0.4,), 32, 4, (("img_size", 32), ("depth", 3), ("embed_dim", 24), ("num_heads", 3))
    ),
)


class Machine:
    """The accelerator, or the CPU where there is none."""

    def __init__(self) -> None:
        self.device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.is_cuda = self.device.type == "cuda"

    def finished(self, step: Step) -> Step:
        """The step with a wait for the device at its end."""
        if self.device.type == "cpu":
            return step

        def step_and_wait() -> None:
            step()
            torch.accelerator.synchronize()

        return step_and_wait

    def peak_gigabytes(self, step: Step) -> float | None:
        """The peak of allocated memory in a step, with weights and optimizer states; None where torch does not tell."""
        if not self.is_cuda:
            return None
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 1e9

    def describe(self) -> str:
        name = torch.cuda.get_device_name() if self.is_cuda else platform.processor() or platform.machine()
        return f"{self.device.type} ({name}), Python {platform.python_version()}"


def make_network(setting: Setting, machine: Machine, **options: Any) -> nn.Module:
    """The network with the weights of one seed, channels-last."""
    torch.manual_seed(0)
    network = timm.create_model(setting.name, num_classes=10, **dict(setting.options), **options)
    return network.to(machine.device).to(memory_format=torch.channels_last)


def make_batch(setting: Setting, machine: Machine) -> tuple[Tensor, Tensor]:
    """A random batch, channels-last."""
    x = torch.randn(setting.batch_size, 3, setting.size, setting.size, device=machine.device)
    y = torch.randint(0, 10, (setting.batch_size,), device=machine.device)
    return x.contiguous(memory_format=torch.channels_last), y


def training_step(network: nn.Module, batch: tuple[Tensor, Tensor], machine: Machine) -> Step:
    """A step of a loop by hand: bf16 autocast, fused AdamW."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(machine.device.type, torch.bfloat16):
            loss = F.cross_entropy(network(batch[0]), batch[1])
        loss.backward()
        optimizer.step()

    return step


def variants(setting: Setting, rate: float, machine: Machine) -> dict[str, Step]:
    """Training steps of the plain network, of both methods, of timm's mask, and without the dropped blocks."""
    batch = make_batch(setting, machine)
    networks = {"plain": make_network(setting, machine)}
    for method in ("block", "sample"):
        network = make_network(setting, machine)
        cf.apply_stochastic_depth(network, stochastic_method=method, drop_rate=rate, draws="balanced")
        networks[method] = network
    networks["timm's drop path"] = make_network(setting, machine, drop_path_rate=rate)
    networks["the same blocks dropped"], networks["the same blocks absent"] = _dropped_and_absent(
        setting, rate, machine
    )
    return {name: training_step(network, batch, machine) for name, network in networks.items()}


def _dropped_and_absent(setting: Setting, rate: float, machine: Machine) -> tuple[nn.Module, nn.Module]:
    """A network that drops the same blocks in every step, and one that was built without them."""
    dropping = cf.apply_stochastic_depth(make_network(setting, machine), drop_rate=rate)
    blocks = cf.stochastic_blocks(dropping)
    names = {module: name for name, module in dropping.named_modules()}
    is_identity = [
        not any(branch.is_projection(block) for branch in block.block_type.branches_of(block)) for block in blocks
    ]
    candidates = [index for index, is_candidate in enumerate(is_identity) if is_candidate]
    count = max(1, min(len(candidates), round(sum(blocks[0].drop_plan.rates))))
    chosen = {candidates[-1 - index * len(candidates) // count] for index in range(count)}
    plan = blocks[0].drop_plan
    plan.decide([index in chosen for index in range(len(plan.rates))])
    plan.draw = lambda *args, **kwargs: None  # type: ignore[method-assign]  # the same in every step
    absent = make_network(setting, machine)
    for index in chosen:
        absent.set_submodule(names[blocks[index]], nn.Identity())
    return dropping, absent


def torchvision_mask(rate: float, machine: Machine) -> dict[str, Step]:
    """ConvNeXt-T of torchvision with its own mask, and with its rates taken over."""
    batch = make_batch(Setting("", ()), machine)
    networks = {}
    for name, probability in (("plain", 0.0), ("torchvision's StochasticDepth", rate), ("taken over", rate)):
        torch.manual_seed(0)
        network = convnext_tiny(num_classes=10, stochastic_depth_prob=probability)
        networks[name] = network.to(machine.device).to(memory_format=torch.channels_last)
    cf.apply_stochastic_depth(networks["taken over"])
    return {name: training_step(network, batch, machine) for name, network in networks.items()}


@contextmanager
def trainer_and_loop(setting: Setting, rate: float, machine: Machine, num_steps: int) -> Iterator[dict[str, Step]]:
    """`num_steps` steps of a Trainer, and of a loop by hand with the same settings."""
    batch = make_batch(setting, machine)
    by_hand = training_step(cf.apply_stochastic_depth(make_network(setting, machine), drop_rate=rate), batch, machine)

    def loop() -> None:
        for _ in range(num_steps):
            by_hand()

    model = ComposerClassifier(make_network(setting, machine), 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    trainer = Trainer(
        model,
        [batch] * num_steps,
        algorithms=StochasticDepth(drop_rate=rate),
        optimizers=optimizer,
        precision="amp_bf16",
        device=machine.device,
        progress_bar=False,
    )

    def fit() -> None:
        trainer.fit(duration="1ep")

    yield {"loop by hand": loop, "Trainer": fit}
    trainer.close()


def compiled(setting: Setting, rate: float, machine: Machine) -> dict[str, Step]:
    """The plain network and the block method, each with and without torch.compile."""
    batch, networks = make_batch(setting, machine), {}
    for suffix in ("", ", compiled"):
        networks[f"plain{suffix}"] = make_network(setting, machine)
        networks[f"block{suffix}"] = cf.apply_stochastic_depth(make_network(setting, machine), drop_rate=rate)
    networks["plain, compiled"].compile()
    cf.compile_stochastic_blocks(networks["block, compiled"])
    networks["block, compiled"].compile()
    return {name: training_step(network, batch, machine) for name, network in networks.items()}


def table(steps: dict[str, Step], images: int, rounds: int, machine: Machine, warmup: int = 4) -> list[str]:
    """Rows of a table: images per second, the step time as a ratio to that of the first variant, peak memory."""
    seconds = time_in_turns({name: machine.finished(step) for name, step in steps.items()}, rounds, warmup)
    first = next(iter(steps))
    rows = ["| | images/s | step time | peak memory (GB) |", "|---|---|---|---|"]
    for name, step in steps.items():
        ratio = statistics.median(one / other for one, other in zip(seconds[name], seconds[first], strict=True))
        memory = machine.peak_gigabytes(step)
        peak = "not measured" if memory is None else f"{memory:.2f}"
        rows.append(f"| {name} | {images / statistics.median(seconds[name]):,.0f} | {ratio:.3f} | {peak} |")
    return rows


def measure(settings: Sequence[Setting], rounds: int, *, with_torchvision: bool) -> Iterator[str]:
    """The lines of the page."""
    machine, first = Machine(), settings[0]
    yield "# Speed on a GPU"
    yield ""
    yield (
        f"Measured on {datetime.date.today()} by `python benchmarks/gpu.py`: {machine.describe()}, torch "
        f"{torch.__version__}, timm {version('timm')}. bf16 autocast, channels-last, fused AdamW, random "
        f"images, {rounds} rounds in turns. The step time is the median ratio to the first row of a table."
    )
    for setting in settings:
        for rate in setting.rates:
            yield from ("", f"## {setting.name}, {rate} linear, {setting.batch_size} images of {setting.size} px", "")
            yield from table(variants(setting, rate, machine), setting.batch_size, rounds, machine)
    if with_torchvision:
        yield from ("", "## convnext_tiny of torchvision, 0.4", "")
        yield from table(torchvision_mask(0.4, machine), Setting("", ()).batch_size, rounds, machine)
    yield from ("", f"## The Trainer, {first.name}, {first.rates[0]} linear, 10 steps", "")
    with trainer_and_loop(first, first.rates[0], machine, 10) as steps:
        yield from table(steps, 10 * first.batch_size, rounds, machine)
    yield from ("", f"## torch.compile, {first.name}, {first.rates[0]} linear", "")
    steps = compiled(first, first.rates[0], machine)  # by the end of the warm-up every block was kept once
    yield from table(steps, first.batch_size, rounds, machine, warmup=20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small networks and images; writes no page")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds (default 40, with --quick 2)")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks-gpu.md"), help="the page")
    options = parser.parse_args(arguments)
    if not options.quick and Machine().device.type == "cpu":
        parser.error("there is no accelerator; --quick runs small networks on the CPU")
    rounds = options.rounds or (2 if options.quick else 40)
    settings = QUICK if options.quick else FULL
    lines = []
    for line in tqdm(measure(settings, rounds, with_torchvision=not options.quick), unit="line", disable=options.quick):
        lines.append(line)
        tqdm.write(line)
    if not options.quick:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
