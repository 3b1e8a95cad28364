"""Crafted checkpoint files with valid checksums."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from etude import Trainer
from etude.algorithms import StochasticDepth
from etude.cli.trained import Recorded, load_trained, record_depth, save_trained
from etude.engine import Callback, Logger, LoggerDestination, State
from etude.models import composer_resnet
from etude.trainer import CheckpointSaver
from etude.trainer.checkpoint.file import VERSION, read_checkpoint, write_checkpoint
from etude.trainer.checkpoint.folder import read_pointer
from helpers.networks import images, tiny_resnet
from helpers.resumable import differences

Place = tuple[Any, ...]


class Watch(LoggerDestination):
    """A destination that keeps a text."""

    def state_dict(self) -> dict[str, Any]:
        return {"note": "a text"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != {"note": "a text"}:
            raise ValueError(f"it must be a text, got {state!r}")


def make_trainer(save_to: str = "elsewhere", watching: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """Everything that keeps a state: momentum, a schedule, an algorithm, a saver, a loss scaler, files."""
    torch.manual_seed(0)
    model = tiny_resnet(num_blocks=2)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(
        model,
        images(8),
        images(4),
        "2ep",
        algorithms=StochasticDepth(drop_rate=0.5),
        optimizers=optimizer,
        schedulers=OneCycleLR(optimizer, max_lr=0.2, total_steps=8),
        callbacks=[CheckpointSaver(save_to, "1ba", num_to_keep=-1, best="min:loss/eval/total"), *watching],
        loggers=Watch(),
        precision="amp_fp16",
        device="cpu",
        progress_bar=False,
        **{"run_name": "run", **settings},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with checkpoints; the tests work in its folder and leave it as it is."""
    folder, before = tmp_path_factory.mktemp("run"), Path.cwd()
    os.chdir(folder)
    make_trainer("saved").fit()
    yield folder
    os.chdir(before)


@pytest.fixture
def contents(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "saved" / "ep1-ba3.pt")


def places(value: Any, place: Place = ()) -> list[Place]:
    """All places of a nest, but only the first and last of long lists of numbers."""
    found = [place]
    if isinstance(value, dict):
        found += [inner for key in value for inner in places(value[key], (*place, key))]
    elif isinstance(value, (list, tuple)):
        numbers = range(len(value)) if len(value) < 20 else (0, len(value) - 1)
        found += [inner for number in numbers for inner in places(value[number], (*place, number))]
    return found


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def changed(value: Any, place: Place, change: Callable[[Any], Any]) -> Any:
    """A copy with something else at one place."""
    if not place:
        return change(value)
    if isinstance(value, dict):
        return {key: changed(item, place[1:], change) if key == place[0] else item for key, item in value.items()}
    items = [changed(item, place[1:], change) if n == place[0] else item for n, item in enumerate(value)]
    return type(value)(items)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def look(trainer_parts: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = trainer_parts["model"], trainer_parts["optimizer"]
    return {
        "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": deepcopy(optimizer.state_dict()),
    }


class Attempt:
    """Resumes from contents; the parts of the run are at hand even if that is refused."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = folder / "crafted.pt"
        self.monkeypatch = monkeypatch
        self.parts: dict[str, Any] = {}

    def __call__(self, crafted: dict[str, Any], **settings: Any) -> ValueError | None:
        """The refusal, or None if it was taken. Any other error is passed on."""
        if settings.get("load_weights_only"):
            settings["run_name"] = None  # a new training has metrics of its own
        write_checkpoint(self.path, crafted)
        files = bytes_of(self.path.parent / "runs")
        before: dict[str, Any] = {}
        attempt = self

        class Watched(Callback):
            def before_load(self, state: State, logger: Logger) -> None:
                attempt.parts = {"model": state.model, "optimizer": state.optimizers[0]}
                before.update(look(attempt.parts))

        with self.monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", self.forbidden)
            try:
                make_trainer(load_path=self.path, watching=[Watched()], **settings)
            except ValueError as error:
                assert differences(before, look(self.parts)) == []
                assert bytes_of(self.path.parent / "runs") == files
                return error
            finally:
                self.path.unlink()
        for path, content in files.items():  # which the resume has truncated
            Path(path).write_bytes(content)
        return None

    def forbidden(self, *args: Any) -> None:
        raise AssertionError(f"nothing is imported, got {args}")


@pytest.fixture
def attempt(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    before = bytes_of(run)
    yield Attempt(run, monkeypatch)
    assert bytes_of(run) == before


FREE = (
    *("max_duration", "torch", "python", "device", "world_size"),
    *("deterministic_mode", "eval_interval", "parallelism", "buffers"),
)


class TestWhatTheProjectWrites:
    def test_checkpoints_load_safely_anywhere(self, run: Path) -> None:
        saved = list((run / "saved").glob("*.pt"))
        assert len(saved) > 3
        for path in saved:
            assert torch.load(path, weights_only=True)["version"] == VERSION

    def test_pointers_are_names(self, run: Path) -> None:
        for pointer in ("latest", "best"):
            assert (run / "saved" / f"{read_pointer(run / 'saved', pointer)}").is_file()

    def test_weights_load_safely_anywhere(self, tmp_path: Path) -> None:
        classifier = composer_resnet("resnet18", num_classes=3)
        algorithm = StochasticDepth(drop_rate=0.5)
        Trainer(classifier, images(4), None, "1ba", algorithms=algorithm, optimizers=SGD(classifier.parameters(), 0.1),
                device="cpu", progress_bar=False)  # fmt: skip
        known = {"class_names": ("a", "b", "c"), "mean": (0.0,) * 3, "std": (1.0,) * 3}
        depth = record_depth(algorithm.plan, "block")
        recorded = Recorded(model="resnet18", image_size=8, resize_size=8, **known, **depth)
        save_trained(tmp_path, classifier.module, recorded)
        assert torch.load(tmp_path / "weights.pt", weights_only=True)["model"] == "resnet18"
        trained = load_trained(tmp_path)
        assert isinstance(trained.network, nn.Module)
        assert trained.recorded == recorded

    def test_an_unchanged_checkpoint_is_taken(self, contents: dict[str, Any], attempt: Attempt) -> None:
        assert attempt(contents) is None


class TestTexts:
    def test_code_in_any_text_does_not_run(self, contents: dict[str, Any], attempt: Attempt, run: Path) -> None:
        """One text after the other, and all of them at once. Those that matter are refused."""
        code = f"__import__('os').system('touch {run / 'it_ran'}')"
        texts = [place for place in places(contents) if isinstance(at(contents, place), str)]
        assert len(texts) > 30
        taken = []
        for place in texts:
            if attempt(changed(contents, place, lambda value: code)) is None:
                taken.append(place)
            assert not (run / "it_ran").exists()
        everything = contents
        for place in texts:
            everything = changed(everything, place, lambda value: code)
        assert attempt(everything) is not None
        assert not (run / "it_ran").exists()
        assert all(is_harmless(place) for place in taken), taken

    def test_code_as_any_key_does_not_run(self, contents: dict[str, Any], attempt: Attempt, run: Path) -> None:
        code = f"__import__('os').system('touch {run / 'it_ran'}')"
        nests = [place for place in places(contents) if isinstance(at(contents, place), dict) and at(contents, place)]
        assert len(nests) > 10
        for place in nests:
            first = next(iter(at(contents, place)))
            if place == () and first == "version":
                first = "settings"
            attempt(changed(contents, place, lambda nest, first=first: renamed(nest, first, code)))
            assert not (run / "it_ran").exists()


def renamed(nest: dict[str, Any], old: Any, new: str) -> dict[str, Any]:
    return {new if key == old else key: value for key, value in nest.items()}


def is_harmless(place: Place) -> bool:
    """Free settings, which are only named; names of what may come and go; texts that only their owner reads."""
    if place[0] == "settings":
        return place[1] in FREE
    if place[0] == "evaluation_factors":
        return place[2] == "module"
    return place[0] in ("callbacks", "loggers", "schedulers") or place == ("callbacks", 0, "state", "best")


WRONG: dict[str, Any] = {
    "none": None,
    "text": "text",
    "number in a text": "3",
    "negative": -7,
    "huge": 10**200,
    "fraction": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "list": [[[]]],
    "dict": {"a": {"b": None}},
    "tensor": torch.ones(2, 3),
    "empty tensor": torch.empty(0),
    "bool": True,
    "bytes of a type": torch.float16,
}


class TestValues:
    @pytest.mark.parametrize("kind", WRONG)
    @pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_wrong_state_raises_a_value_error_or_is_loaded(
        self, contents: dict[str, Any], attempt: Attempt, kind: str, every: int
    ) -> None:
        """Anywhere in a checkpoint: no other error, and no run that is half resumed."""
        wrong = WRONG[kind]
        chosen = [p for p in places(contents) if p and p != ("version",) and not (p[0] == "settings" and len(p) > 2)]
        assert len(chosen) > 100
        chosen = chosen[::every]
        refused = [p for p in chosen if attempt(changed(contents, p, lambda value: deepcopy(wrong))) is not None]
        assert len(refused) > 0.2 * len(chosen)

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("progress", "timestamp", "batch"), -1),
            (("progress", "timestamp", "batch"), 3.0),
            (("progress", "timestamp", "batch"), "3"),
            (("progress", "timestamp", "batch"), 2**70),
            (("progress", "timestamp", "batch"), True),
            (("progress", "timestamp", "epoch"), 4),
            (("progress", "timestamp", "epoch"), -1),
            (("progress", "timestamp", "batch_in_epoch"), 3),
            (("progress", "timestamp", "batch_in_epoch"), -1),
            (("progress", "timestamp", "sample"), -1),
            (("progress", "timestamp", "sample_in_epoch"), 13),
            (
                (
                    "progress",
                    "evaluated_at",
                ),
                4,
            ),
            (
                (
                    "progress",
                    "evaluated_at",
                ),
                -2,
            ),
            (
                (
                    "progress",
                    "evaluated_at",
                ),
                "__import__('os')",
            ),
            (
                (
                    "progress",
                    "eval_metrics",
                ),
                [1],
            ),
            (("progress", "eval_metrics", "loss/eval/total"), "high"),
            (("progress", "eval_metrics", "loss/eval/total"), 10**400),
            (
                (
                    "progress",
                    "device_train_microbatch_size",
                ),
                0,
            ),
            (
                (
                    "progress",
                    "device_train_microbatch_size",
                ),
                True,
            ),
            (("scaler", "scale"), None),
            (("ranks",), []),
            (("ranks", 0, "generators", "torch"), torch.zeros(7, dtype=torch.uint8)),
            (("ranks", 0, "generators", "torch"), torch.zeros(5056, dtype=torch.int8)),
            (("ranks", 0, "generators", "numpy", "state", "pos"), 10**6),
            (("ranks", 0, "generators", "numpy", "state", "pos"), -1),
            (("ranks", 0, "generators", "numpy", "state", "key"), [0]),
            (("ranks", 0, "generators", "numpy", "state", "key"), [2**40] * 624),
            (("ranks", 0, "generators", "numpy", "bit_generator"), "os.system"),
            (("ranks", 0, "generators", "python", 1), (1, 2)),
            (("algorithms", 0, "state", "num_steps"), float("inf")),
            (("algorithms", 0, "state", "sum_of_rates"), [0.5]),
            (("optimizers", 0, "state", "state"), {99: {"momentum_buffer": 1}}),
            (("optimizers", 0, "state", "param_groups"), []),
            (("schedulers",), []),
            (("callbacks", 0, "state", "best_name"), "../x"),
            (("callbacks", 0, "state", "best_name"), "../ep1-ba3.pt"),
            (("callbacks", 0, "state", "best_name"), "/etc/passwd"),
            (("callbacks", 0, "state", "best_name"), "ep1-ba3.pt\n"),
            (("callbacks", 0, "state", "best_value"), float("nan")),
            (("callbacks", 0, "state", "best_value"), "1"),
            (("loggers", 0, "state", "num_written"), -1),
            (("loggers", 1, "state", "note"), "another"),
        ],
        ids=lambda value: f"{value}"[:60],
    )
    def test_impossible_values_are_refused(
        self, contents: dict[str, Any], attempt: Attempt, place: Place, value: Any
    ) -> None:
        if place[:1] == ("loggers",):
            names = [item["name"] for item in contents["loggers"]]
            place = ("loggers", names.index(["FileLogger", "Watch"][place[1]]), *place[2:])
        assert at(contents, place) is not value
        assert attempt(changed(contents, place, lambda old: value)) is not None

    def test_no_part_may_be_missing(self, contents: dict[str, Any], attempt: Attempt) -> None:
        for name in contents:
            if name != "version":
                assert attempt({key: value for key, value in contents.items() if key != name}) is not None, name

    @pytest.mark.parametrize(
        "change",
        [
            lambda weight: weight.double(),
            lambda weight: weight.to(torch.complex64),
            lambda weight: weight.int(),
            lambda weight: weight.to_sparse(),
            lambda weight: weight.flatten(),
            lambda weight: weight[None],
            lambda weight: torch.empty_like(weight, device="meta"),
            lambda weight: weight.tolist(),
            lambda weight: None,
        ],
    )
    @pytest.mark.parametrize("weights_only", [False, True])
    def test_weights_of_another_form_are_refused(
        self, contents: dict[str, Any], attempt: Attempt, change: Callable[[Tensor], Any], weights_only: bool
    ) -> None:
        last = list(contents["model"])[-2]
        crafted = changed(contents, ("model", last), change)
        assert "must fit the model" in str(attempt(crafted, load_weights_only=weights_only))

    @pytest.mark.parametrize("model", ["text", None, [], {}, {1: 2}, {"unknown": torch.ones(1)}])
    def test_a_checkpoint_without_valid_weights_is_refused(self, attempt: Attempt, model: Any) -> None:
        assert attempt({"version": VERSION, "model": model}, load_weights_only=True) is not None

    def test_a_checkpoint_without_a_model_is_refused(self, attempt: Attempt) -> None:
        assert attempt({"version": VERSION}, load_weights_only=True) is not None
