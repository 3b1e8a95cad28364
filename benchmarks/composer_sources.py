"""Run Composer's own algorithms and callbacks on etude's engine, and print which run.

    pip download mosaicml==0.32.1 --no-deps && unzip mosaicml-*.whl -d composer_src
    python benchmarks/composer_sources.py composer_src

The sources are read from the given folder, outside of the repository. Their imports of Composer's engine (`ENGINE`)
find etude; what is no part of the engine, such as helper functions for tensors and module surgery, is Composer's own.
Each algorithm and callback then trains a small convolutional network for two epochs of four batches under
`etude.Trainer`, with evaluations. Composer's SystemMetricsMonitor needs psutil, and what imports its CheckpointSaver a
package of its platform.
"""

import argparse
import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from etude import Trainer
from etude.loggers import InMemoryLogger
from etude.models import ComposerModel

ENGINE = {
    "composer.core.algorithm": "etude.core",
    "composer.core.callback": "etude.core",
    "composer.core.engine": "etude.core",
    "composer.core.evaluator": "etude.core",
    "composer.core.event": "etude.core",
    "composer.core.passes": "etude.core",
    "composer.core.precision": "etude.core",
    "composer.core.state": "etude.core",
    "composer.core.time": "etude.core",
    "composer.loggers.logger": "etude.loggers",
    "composer.loggers.logger_destination": "etude.loggers",
    "composer.models.base": "etude.models",
    "composer.models.tasks.classification": "etude.models",
    "composer.optim.scheduler": "etude.optim",
    "composer.trainer.trainer": "etude",
}
"""Modules of Composer, each with the module of etude that stands in its place."""


class ComposerFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``composer`` from a folder, with etude's engine in the place of Composer's.

    A package does not run its ``__init__``, which would import all of Composer: its names are imported when they are
    used.

    Args:
        folder: Holds the package ``composer``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "composer":
            return None
        place = self.folder.joinpath(*fullname.split("."))
        if fullname in ENGINE or (place / "__init__.py").is_file():
            spec = importlib.machinery.ModuleSpec(fullname, self, is_package=place.is_dir())
            if place.is_dir():
                spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        return importlib.util.spec_from_file_location(fullname, file) if file.is_file() else None

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        if name in ENGINE:
            module.__dict__["__getattr__"] = engine_names(name)
        else:
            module.__dict__["__getattr__"] = lazy_names(self.folder.joinpath(*name.split("."), "__init__.py"), name)


def engine_names(module: str) -> Callable[[str], Any]:
    """The names of etude that stand for those of a module of Composer's engine."""

    def find(name: str) -> Any:
        try:
            return getattr(importlib.import_module(ENGINE[module]), name)
        except AttributeError:
            raise AttributeError(f"{ENGINE[module]} has no {name}, as {module} has") from None

    return find


def lazy_names(init: Path, package: str) -> Callable[[str], Any]:
    """The names that the ``__init__`` of a package imports, each imported on use."""
    origins = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse(init.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name in origins:
            module, original = origins[name]
            if module != package:
                return getattr(importlib.import_module(str(module)), original)
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"{package} has no {name}") from None

    return find


class Classifier(ComposerModel):
    """A small convolutional network that has what the algorithms look for."""

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = small_network() if module is None else module
        self.num_classes = 3

    def forward(self, batch: Any) -> Tensor:
        return self.module(batch[0])

    def loss(self, outputs: Tensor, batch: Any, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, batch[1], reduction=reduction)

    def get_metrics(self, is_train: bool) -> dict[str, Any]:
        from torchmetrics.classification import MulticlassAccuracy

        return {} if is_train else {"MulticlassAccuracy": MulticlassAccuracy(3, average="micro")}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Any) -> None:
        metric.update(outputs, batch[1])


def small_network() -> nn.Module:
    """Convolutions, normalizations of each kind, dropout and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GroupNorm(4, 32),
        nn.MaxPool2d(3, 1, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(32),
        nn.Dropout(0.1),
        nn.Linear(32, 3),
    )


def bottlenecks() -> Classifier:
    """A ResNet of five blocks."""
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    return Classifier(ResNet(Bottleneck, [2, 1, 1, 1], num_classes=3))


class Pictures(torch.utils.data.Dataset[Any]):
    """PIL images with a place for transforms, as torchvision's data sets have."""

    def __init__(self) -> None:
        from torchvision.datasets.vision import StandardTransform
        from torchvision.transforms import ToTensor

        self.transform = ToTensor()
        self.target_transform = None
        self.transforms = StandardTransform(self.transform, None)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transforms(Image.new("RGB", (16, 16), (index * 10, 99, 200 - index)), index % 3)


def tensors(num_classes: int = 3) -> DataLoader[Any]:
    """Four batches of four images of 16 x 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(16, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.arange(16) % num_classes), 4)


def binary() -> DataLoader[Any]:
    """The same with two classes."""
    return tensors(2)


def pictures() -> DataLoader[Any]:
    """The same as PIL images, for algorithms that add a transform to the data set."""
    return DataLoader(_vision(Pictures()), 4)


def _vision(dataset: Any) -> Any:
    """Composer changes the transforms of subclasses of torchvision's VisionDataset only."""
    from torchvision.datasets import VisionDataset

    dataset.__class__ = type("Pictures", (Pictures, VisionDataset), {"__repr__": object.__repr__})
    return dataset


ALGORITHMS: dict[str, dict[str, Any]] = {
    "AugMix": {"data": pictures},
    "BlurPool": {"settings": {"min_channels": 4}},
    "ChannelsLast": {},
    "ColOut": {},
    "CutMix": {},
    "CutOut": {"settings": {"length": 0.5}},
    "EMA": {"settings": {"half_life": "2ba"}},
    "Factorize": {"settings": {"min_channels": 4, "latent_channels": 4, "min_features": 4, "latent_features": 2}},
    "GhostBatchNorm": {"settings": {"ghost_batch_size": 2}},
    "GradientClipping": {"settings": {"clipping_type": "norm", "clipping_threshold": 0.1}},
    "GyroDropout": {"settings": {"sigma": 2, "tau": 2}},
    "LabelSmoothing": {},
    "LayerFreezing": {"settings": {"freeze_start": 0.1, "freeze_level": 0.5}},
    "LowPrecisionGroupNorm": {"trainer": {"precision": "amp_bf16"}},
    "LowPrecisionLayerNorm": {"trainer": {"precision": "amp_bf16"}},
    "MixUp": {},
    "NoOpModel": {"data": binary},
    "ProgressiveResizing": {},
    "RandAugment": {"data": pictures},
    "SAM": {},
    "SelectiveBackprop": {"settings": {"start": 0.1, "end": 0.9, "keep": 0.5}},
    "SqueezeExcite": {"settings": {"min_channels": 4, "latent_channels": 2}},
    "StochasticDepth": {"settings": {"target_layer_name": "ResNetBottleneck"}, "model": bottlenecks},
    "SWA": {"settings": {"swa_start": "0.2dur", "swa_end": "0.9dur", "update_interval": "1ba"}},
    "WeightStandardization": {},
}
"""Composer's algorithms for images."""

CALLBACKS: dict[str, dict[str, Any]] = {
    "ActivationMonitor": {},
    "CheckpointSaver": {"settings": {"folder": "composer_checkpoints"}},
    "EarlyStopper": {"settings": {"monitor": "MulticlassAccuracy", "dataloader_label": "eval"}},
    "ExportForInferenceCallback": {"settings": {"save_format": "torchscript", "save_path": "model.pt"}},
    "FreeOutputs": {},
    "ImageVisualizer": {},
    "LRMonitor": {},
    "LoadCheckpoint": {"settings": {"load_path": "composer_checkpoints"}},
    "MemoryMonitor": {},
    "MemorySnapshot": {},
    "NaNMonitor": {},
    "OOMObserver": {},
    "OptimizerMonitor": {},
    "RuntimeEstimator": {},
    "SpeedMonitor": {"settings": {"window_size": 2}},
    "SystemMetricsMonitor": {},
    "ThresholdStopper": {"settings": {"monitor": "MulticlassAccuracy", "dataloader_label": "eval", "threshold": 0.99}},
}
"""Composer's callbacks, except Generate (language models) and MLPerfCallback (a logging package of its own)."""


def run(make: Callable[..., Any], kind: str, entry: dict[str, Any]) -> str:
    """Train with one of Composer's objects; the empty string, or what went wrong."""
    torch.manual_seed(0)
    data = entry.get("data", tensors)
    trainer = None
    try:
        model = entry.get("model", Classifier)()
        trainer = Trainer(
            model,
            data(),
            data(),
            "2ep",
            optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            loggers=InMemoryLogger(),
            device="cpu",
            progress_bar=False,
            **{kind: make(**entry.get("settings", {}))},
            **entry.get("trainer", {}),
        )
        trainer.fit()
        if trainer.state.timestamp.batch != 8 and not trainer.state.is_stopped:
            return f"it ended after {trainer.state.timestamp.batch} batches"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        if trainer is not None:
            trainer.close()


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an unpacked mosaicml wheel, or a folder of installed packages")
    parser.add_argument("--only", help="the name of one algorithm or callback, which may raise")
    arguments = parser.parse_args()
    if not (arguments.folder / "composer" / "__init__.py").is_file():
        parser.error(f"the folder must hold the package composer, got {arguments.folder}")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.meta_path.insert(0, ComposerFinder(arguments.folder.resolve()))
    for kind, entries in (("algorithms", ALGORITHMS), ("callbacks", CALLBACKS)):
        failures = {}
        for name, entry in entries.items():
            if arguments.only not in (None, name):
                continue
            package = importlib.import_module(f"composer.{kind}")
            try:
                failures[name] = run(getattr(package, name), kind, entry)
            except Exception as error:
                failures[name] = f"cannot be imported: {type(error).__name__}: {error}"
            print(f"  {name:28}{failures[name] or 'runs'}", flush=True)
        print(f"{sum(not failure for failure in failures.values())} of {len(failures)} {kind} run\n")


if __name__ == "__main__":
    main()
