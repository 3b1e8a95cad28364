"""Random training setups, generated from a seed."""

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler, StepLR
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchvision.models.resnet import BasicBlock

NUM_CLASSES = 3
Pair = namedtuple("Pair", ["x", "y"])


class OwnDict(OrderedDict[str, Any]):
    """A dictionary of the user's own class."""


@dataclass
class Example:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "dict": lambda x, y: {"x": x, "y": y},
    "subclass of dict": lambda x, y: OwnDict(x=x, y=y),
    "UserDict": lambda x, y: UserDict({"x": x, "y": y}),
    "namedtuple": Pair,
    "dataclass": Example,
    "strings beside tensors": lambda x, y: {"x": x, "y": y, "names": [f"row {number}" for number in range(len(x))]},
}


def inputs_and_targets(batch: Any) -> tuple[Tensor, Tensor]:
    """The tensors of a batch, whatever its container."""
    if isinstance(batch, (tuple, list)):
        return batch[0], batch[1]
    if isinstance(batch, Example):
        return batch.x, batch.y
    if "names" in batch:
        assert len(batch["names"]) == len(batch["x"]), "strings must be split as the tensors are"
    return batch["x"], batch["y"]


class Rows(Dataset[Any]):
    """Rows that differ from each other, so that a recorded batch tells which ones it holds."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], bad_row: int | None) -> None:
        generator = torch.Generator().manual_seed(num_rows)
        self.x = torch.randn(num_rows, *shape, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
        if bad_row is not None:
            self.x[bad_row] = float("nan")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class GrowingBatches(Sampler[list[int]]):
    """Batches of the user's own sampler: 2, 4, 6, 2, 4, 6 ... rows."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Any:
        start, size = 0, 2
        while start + size <= self.num_rows:
            yield list(range(start, start + size))
            start, size = start + size, size % 6 + 2

    def __len__(self) -> int:
        return len(list(iter(self)))


class UnseededBatches(Sampler[list[int]]):
    """Batches of the user's own sampler, in an order that no seed decides."""

    def __init__(self, num_rows: int, batch_size: int) -> None:
        self.num_rows, self.batch_size = num_rows, batch_size

    def __iter__(self) -> Any:
        order = random.SystemRandom().sample(range(self.num_rows), self.num_rows)
        yield from (order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size))

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)


class Stream(IterableDataset[Any]):
    """The rows of a dataset as a stream without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[number] for number in range(len(self.rows)))


class Network(nn.Module):
    """A stem, residual blocks that stochastic depth converts, and a linear layer.

    Args:
        kind: Of the blocks.
        num_blocks: How many.
        runs_twice: Whether the loss runs the model again, as R-Drop does.
    """

    extra: nn.Linear

    def __init__(self, kind: str, num_blocks: int, runs_twice: bool) -> None:
        super().__init__()
        self.kind, self.runs_twice = kind, runs_twice
        if kind == "transformer":
            self.stem: nn.Module = nn.Linear(4, 8)
            layers = [
                nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
                for _ in range(num_blocks)
            ]
            self.blocks = nn.ModuleList(layers)
        else:
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            norm = nn.BatchNorm2d if kind == "resnet with BatchNorm" else partial(nn.GroupNorm, 2)
            self.blocks = nn.ModuleList(BasicBlock(4, 4, norm_layer=norm) for _ in range(num_blocks))
        self.head = nn.Linear(8 if kind == "transformer" else 4, NUM_CLASSES)
        self.double()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return (3, 4) if self.kind == "transformer" else (2, 4, 4)

    def forward(self, batch: Any) -> Tensor:
        x, _ = inputs_and_targets(batch)
        x = self.begin(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x)

    def begin(self, x: Tensor) -> Tensor:
        """What comes before the blocks."""
        return self.stem(x) if self.kind == "transformer" else self.stem(x).relu()

    def end(self, x: Tensor) -> Tensor:
        """What comes after the blocks."""
        x = x.mean(1) if self.kind == "transformer" else x.mean((2, 3))
        return self.head(x + self.extra(x) if hasattr(self, "extra") else x)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        targets = inputs_and_targets(batch)[1]
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss + 0.5 * nn.functional.cross_entropy(self(batch), targets) if self.runs_twice else loss


def replace_head(model: Network, optimizer: Optimizer) -> None:
    """Give the last layer new parameters, as an algorithm does at INIT."""
    new = {id(old): nn.Parameter(0.5 * old.detach()) for old in model.head.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]
    model.head.weight, model.head.bias = new[id(model.head.weight)], new[id(model.head.bias)]


def add_layer(model: Network, optimizer: Optimizer) -> None:
    """Add a layer that trains from now on."""
    model.extra = nn.Linear(model.head.in_features, model.head.in_features, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.extra.parameters():
            parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    optimizer.param_groups[1]["params"].extend(model.extra.parameters())


class Choice(NamedTuple):
    """Something with a name, so that a failing situation can be read."""

    name: str
    build: Callable[..., Any]


OPTIMIZERS = [
    Choice("SGD", partial(SGD, lr=0.05)),
    Choice("SGD with momentum", partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)),
    Choice("fused SGD with momentum", partial(SGD, lr=0.05, momentum=0.9, fused=True)),
    Choice("Adam", partial(Adam, lr=0.01)),
    Choice("AdamW, foreach", partial(AdamW, lr=0.01, foreach=True)),
    Choice("fused AdamW", partial(AdamW, lr=0.01, fused=True)),
    Choice("RMSprop", partial(RMSprop, lr=0.005)),
    Choice("Adagrad", partial(Adagrad, lr=0.05)),
]
SCHEDULERS = [
    Choice("none", lambda optimizer: None),
    Choice("StepLR", lambda optimizer: StepLR(optimizer, 2, 0.5)),
    Choice("ExponentialLR", lambda optimizer: ExponentialLR(optimizer, 0.9)),
    Choice("CosineAnnealingLR", lambda optimizer: CosineAnnealingLR(optimizer, 9)),
    Choice("LambdaLR", lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (1 + step))),
]
SAMPLERS: list[Choice] = [
    Choice("in order", lambda rows, size: BatchSampler(SequentialSampler(rows), size, False)),
    Choice("shuffled", lambda rows, size: BatchSampler(RandomSampler(rows), size, False)),
    Choice("shuffled, full batches", lambda rows, size: BatchSampler(RandomSampler(rows), size, True)),
    Choice(
        "with replacement",
        lambda rows, size: BatchSampler(RandomSampler(rows, replacement=True), size, False),
    ),
    Choice(
        "weighted",
        lambda rows, size: BatchSampler(
            WeightedRandomSampler([1.0 + n % 3 for n in range(len(rows))], 12), size, False
        ),
    ),
    Choice("own batches", lambda rows, size: GrowingBatches(len(rows))),
    Choice("unseeded", lambda rows, size: UnseededBatches(len(rows), size)),
]
STREAM = Choice("stream", Stream)
EDITS = ["none", "clip", "noise", "clip after backward", "halve after backward", "replace after backward"]
EDITS_AFTER_BACKWARD = EDITS[3:]


@dataclass
class Situation:
    """One training. Everything follows from `seed` and `num_ranks`."""

    seed: int
    num_ranks: int = 1

    def __post_init__(self) -> None:
        draw = random.Random(f"{self.seed} {self.num_ranks}")
        kinds = ["transformer", "resnet", *(["resnet with BatchNorm"] if self.num_ranks == 1 else [])]
        self.kind = draw.choice(kinds)
        self.num_blocks = draw.randint(2, 4)
        self.container = draw.choice(sorted(CONTAINERS))
        self.num_rows = 2 * draw.randint(6, 10)
        self.batch_size = draw.choice([2, 4, 6])
        self.sampler = draw.choice([*SAMPLERS, *SAMPLERS, STREAM])
        self.num_workers = draw.choice([0, 0, 0, 0, 0, 0, 1])
        self.replaces_head = draw.random() < 0.2
        self.grow_at = draw.choice([None, None, None, draw.randint(0, 3)])
        # Adagrad makes the state of its parameters when it is built, and has none for new ones.
        takes_new = self.replaces_head or self.grow_at is not None
        self.optimizer = draw.choice(OPTIMIZERS[:-1] if takes_new else OPTIMIZERS)
        self.scheduler = draw.choice(SCHEDULERS)
        self.microbatch_size = draw.choice([None, None, 1, 2, 3])
        self.edit = draw.choice(EDITS)
        self.unfreeze_at = draw.choice([None, None, 0, 1, 3])
        self.runs_twice = draw.random() < 0.2
        self.method = draw.choice([None, "block", "block", "sample", "sample"])
        self.is_functional = self.method is not None and draw.random() < 0.4
        self.draws = draw.choice(["independent", "balanced"])
        self.drop_rate = draw.choice([0.3, 0.7, 1.0])
        self.use_same_gpu_seed = draw.random() < 0.7
        self.scaling = draw.choice(["evaluation", "training"]) if self.drop_rate < 1 else "evaluation"
        self.smoothing = draw.choice([None, 0.1]) if self.container in ("tuple", "list") else None
        self.bad_row = draw.choice([None, None, None, draw.randrange(self.num_rows)])
        self.num_steps = draw.randint(5, 9)
        self.stop_at = draw.choice([None, draw.randint(1, self.num_steps - 1)])
        self.ema = draw.choice([None, None, 0.5]) if self.grow_at is None else None
        self.max_nonfinite_steps = draw.choice([100, 100, 0])

    def __str__(self) -> str:
        choices = {name: getattr(value, "name", value) for name, value in vars(self).items()}
        return ", ".join(f"{name}={value}" for name, value in choices.items())

    @property
    def are_sums_in_another_order(self) -> bool:
        """Whether the reference adds the same numbers in another order, and so agrees only up to rounding."""
        return self.num_ranks > 1 or self.method == "sample" or "fused" in self.optimizer.name

    @property
    def may_be_refused_with(self) -> list[str]:
        """The errors with which this training may end; all others are wrong.

        Gradients are averaged after the last microbatch, and after AFTER_BACKWARD in a step in which parameters begin
        to train.
        """
        reasons = []
        changes = self.microbatch_size is not None or self.unfreeze_at is not None or self.grow_at is not None
        if self.num_ranks > 1 and self.edit in EDITS_AFTER_BACKWARD and changes:
            reasons.append("must not be changed at AFTER_BACKWARD")
        if self.num_ranks > 1 and self.sampler is STREAM:
            reasons.append("must be a torch DataLoader over a map-style dataset")
        if self.num_ranks > 1 and self.sampler.name == "unseeded":
            reasons.append("all ranks must list the same batches")
        if self.grow_at is not None and self.stop_at is not None and self.grow_at < self.stop_at:
            reasons.append("the checkpoint must fit the ")  # a model that has the new layer, too
        if self.bad_row is not None and self.max_nonfinite_steps == 0:
            reasons.append("max_nonfinite_steps=0")
        return reasons

    def make_model(self) -> Network:
        torch.manual_seed(self.seed)
        return Network(self.kind, self.num_blocks, self.runs_twice)

    def make_dataloader(self, model: Network) -> DataLoader[Any]:
        rows = Rows(self.num_rows, model.shape, self.bad_row)
        collate, workers = partial(_collate, self.container), self.num_workers
        if self.sampler is STREAM:
            return DataLoader(Stream(rows), self.batch_size, collate_fn=collate, num_workers=workers)
        sampler = self.sampler.build(rows, self.batch_size)
        return DataLoader(rows, batch_sampler=sampler, collate_fn=collate, num_workers=workers)

    def make_optimizer(self, model: nn.Module, **settings: Any) -> tuple[Optimizer, LRScheduler | None]:
        # The stem has a group of its own, as where it is trained with another learning rate.
        stem = [parameter for name, parameter in model.named_parameters() if name.startswith("stem.")]
        rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("stem.")]
        optimizer = self.optimizer.build([{"params": stem}, {"params": rest}], **settings)
        return optimizer, self.scheduler.build(optimizer)


def _collate(container: str, samples: list[tuple[Tensor, Tensor]]) -> Any:
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return CONTAINERS[container](x, y)
