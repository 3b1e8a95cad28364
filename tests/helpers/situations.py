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


class Network(nn.Module):
    """A stem, residual blocks that stochastic depth converts, and a linear layer."""

    def __init__(self, kind: str, num_blocks: int) -> None:
        super().__init__()
        self.kind = kind
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
        return self.head(x.mean(1) if self.kind == "transformer" else x.mean((2, 3)))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, inputs_and_targets(batch)[1])


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
]
EDITS = ["none", "clip", "halve after backward", "replace after backward"]


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
        self.sampler = draw.choice(SAMPLERS)
        self.num_workers = draw.choice([0, 0, 0, 0, 0, 0, 1])
        self.optimizer = draw.choice(OPTIMIZERS)
        self.scheduler = draw.choice(SCHEDULERS)
        self.microbatch_size = draw.choice([None, None, 1, 2, 3])
        self.edit = draw.choice(EDITS)
        self.unfreeze_at = draw.choice([None, None, 0, 1, 3])
        self.method = draw.choice([None, "block", "block", "sample"])
        self.draws = draw.choice(["independent", "balanced"])
        self.drop_rate = draw.choice([0.3, 0.7, 1.0])
        self.use_same_gpu_seed = draw.random() < 0.7
        self.scaling = draw.choice(["evaluation", "training"]) if self.drop_rate < 1 else "evaluation"
        self.smoothing = draw.choice([None, 0.1]) if self.container in ("tuple", "list") else None
        self.bad_row = draw.choice([None, None, None, draw.randrange(self.num_rows)])
        self.num_steps = draw.randint(5, 9)
        self.stop_at = draw.choice([None, draw.randint(1, self.num_steps - 1)])

    def __str__(self) -> str:
        choices = {name: getattr(value, "name", value) for name, value in vars(self).items()}
        return ", ".join(f"{name}={value}" for name, value in choices.items())

    @property
    def are_sums_in_another_order(self) -> bool:
        """Whether the reference adds the same numbers in another order, and so agrees only up to rounding."""
        return self.num_ranks > 1 or self.method == "sample" or "fused" in self.optimizer.name

    @property
    def may_be_refused_with(self) -> str | None:
        """The error of several ranks if gradients are edited before they are averaged; None if all must go well.

        They are averaged after the last microbatch, and after that event in a step in which layers are unfrozen.
        """
        is_before_average = self.microbatch_size is not None or self.unfreeze_at is not None
        edits = self.edit in ("halve after backward", "replace after backward")
        return "must not be changed at AFTER_BACKWARD" if self.num_ranks > 1 and edits and is_before_average else None

    def make_model(self) -> Network:
        torch.manual_seed(self.seed)
        return Network(self.kind, self.num_blocks)

    def make_dataloader(self, model: Network) -> DataLoader[Any]:
        rows = Rows(self.num_rows, model.shape, self.bad_row)
        return DataLoader(
            rows,
            batch_sampler=self.sampler.build(rows, self.batch_size),
            collate_fn=partial(_collate, self.container),
            num_workers=self.num_workers,
        )

    def make_optimizer(self, model: nn.Module, **settings: Any) -> tuple[Optimizer, LRScheduler | None]:
        # The stem has a group of its own, as where it is trained with another learning rate.
        stem = [parameter for name, parameter in model.named_parameters() if name.startswith("stem.")]
        rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("stem.")]
        optimizer = self.optimizer.build([{"params": stem}, {"params": rest}], **settings)
        return optimizer, self.scheduler.build(optimizer)


def _collate(container: str, samples: list[tuple[Tensor, Tensor]]) -> Any:
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return CONTAINERS[container](x, y)
