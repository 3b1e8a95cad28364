"""Resuming with changed settings, other data, or damaged checkpoints."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader

from etude import Trainer
from etude.algorithms import LabelSmoothing, StochasticDepth
from etude.engine import Algorithm, Callback, Event, LoggerDestination
from etude.trainer import CheckpointError, CheckpointSaver
from helpers.networks import LinearModel, vectors
from helpers.recording import At, batch_number
from helpers.resumable import BATCH_SIZE, NUM_STEPS, NoisyImages, differences, fit, make_model, rows_of
from helpers.resumable import make_trainer as make_resnet_trainer


class Scale(Algorithm):
    """Multiplies the loss, and says whether it depends on the duration."""

    def __init__(self, factor: float = 1.0, depends_on_duration: bool = False) -> None:
        self.factor, self._depends = factor, depends_on_duration

    @property
    def depends_on_duration(self) -> bool:
        return self._depends

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        state.loss = self.factor * state.loss


class OtherScale(Scale): ...


class WiderModel(LinearModel):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(2, 2)


class OtherModel(LinearModel): ...


def make_trainer(
    model: LinearModel | None = None,
    *,
    lr: float = 0.1,
    weight_decay: float = 1e-3,
    batch_size: int = 4,
    total_steps: int = 40,
    max_duration: str = "2ep",
    optimizer: Any = None,
    scheduler: Any = None,
    **settings: Any,
) -> Trainer:
    """A shuffled training of six batches per epoch, with momentum and a schedule per batch."""
    torch.manual_seed(0)
    model = LinearModel() if model is None else model
    optimizer = (
        SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay) if optimizer is None else optimizer
    )
    return Trainer(
        model,
        vectors(batch_size=batch_size, shuffle=True),
        vectors(),
        max_duration,
        **{"algorithms": Scale(), **settings},
        optimizers=optimizer,
        schedulers=OneCycleLR(optimizer, max_lr=0.2, total_steps=total_steps) if scheduler is None else scheduler,
        step_schedulers_every_batch=True,
        device="cpu",
        progress_bar=False,
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)


SAVE_ALL = {"save_folder": "saved", "save_interval": "1ba", "save_num_checkpoints_to_keep": -1}


class TestWhereItStartsFrom:
    @pytest.mark.parametrize("exists", [False, True])
    def test_autoresume_without_checkpoints_starts_a_new_training(self, tmp_path: Path, exists: bool) -> None:
        if exists:
            (tmp_path / "saved").mkdir()
        assert differences(fit(make_trainer()), fit(make_trainer(save_folder="saved", autoresume=True))) == []

    def test_without_autoresume_a_folder_with_checkpoints_is_refused(self) -> None:
        fit(make_trainer(**SAVE_ALL))
        with pytest.raises(FileExistsError, match="save_folder must not hold checkpoints of another run"):
            make_trainer(**SAVE_ALL)

    def test_autoresume_without_checkpoints_starts_from_load_path(self) -> None:
        expected = fit(make_trainer(**SAVE_ALL))
        trainer = make_trainer(load_path="saved/ep0-ba4.pt", save_folder="new", autoresume=True)
        assert trainer.state.timestamp.batch == 4
        assert differences(expected, fit(trainer)) == []

    def test_autoresume_comes_before_load_path(self) -> None:
        expected = fit(make_trainer(**SAVE_ALL))
        fit(make_trainer(load_path="saved/ep0-ba4.pt", save_folder="new", autoresume=True))
        trainer = make_trainer(load_path="saved/ep0-ba4.pt", save_folder="new", autoresume=True)
        assert trainer.state.timestamp.batch == 12
        assert differences(expected, fit(trainer)) == []

    def test_a_finished_run_that_is_resumed_trains_nothing_and_has_the_same_results(self, tmp_path: Path) -> None:
        expected = fit(make_trainer(**SAVE_ALL, run_name="run"))
        rows, files = rows_of(tmp_path / "runs" / "run"), bytes_of(tmp_path / "saved")
        steps = At(Event.BATCH_START, batch_number)
        resumed = make_trainer(**SAVE_ALL, run_name="run", autoresume=True, callbacks=steps)
        assert differences(expected, fit(resumed)) == []
        assert steps.answers == []
        assert rows_of(tmp_path / "runs" / "run") == rows
        assert bytes_of(tmp_path / "saved") == files

    def test_load_path_may_be_a_folder(self) -> None:
        expected = fit(make_trainer(**SAVE_ALL))
        Path("saved/ep2-ba12.pt").unlink()
        Path("saved/latest").write_text("ep0-ba3.pt\n")
        trainer = make_trainer(load_path=Path("saved"))
        assert trainer.state.timestamp.batch == 3
        assert differences(expected, fit(trainer)) == []

    @pytest.mark.parametrize("name", ["nothing", "nothing/ep1-ba5.pt"])
    def test_a_load_path_without_anything_is_an_error(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} cannot be loaded: there is no such file"):
            make_trainer(load_path=name)

    def test_a_folder_without_checkpoints_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="load_path must be a checkpoint or a folder of checkpoints, got"):
            make_trainer(load_path=tmp_path)

    def test_the_weights_only_start_a_new_training(self) -> None:
        """As if the model had had them from the beginning, also in another training."""
        fit(make_trainer(**SAVE_ALL))
        trained = torch.load("saved/ep1-ba7.pt", weights_only=True)["model"]
        expected = LinearModel()
        expected.load_state_dict(trained)
        trainer = make_trainer(load_path="saved/ep1-ba7.pt", load_weights_only=True, lr=0.03, seed=5)
        state = trainer.state
        assert state.timestamp.batch == state.timestamp.epoch == 0
        assert state.optimizers[0].state_dict()["state"] == {}
        assert differences(trained, dict(state.model.state_dict())) == []
        assert differences(fit(make_trainer(expected, lr=0.03, seed=5)), fit(trainer)) == []

    def test_the_weights_of_another_model_are_refused(self) -> None:
        fit(make_trainer(**SAVE_ALL))
        with pytest.raises(ValueError, match=r"the checkpoint must fit the model, 'more\.weight' has shape"):
            make_trainer(WiderModel(), load_path="saved", load_weights_only=True)

    def test_load_events_are_announced_around_the_loading(self) -> None:
        fit(make_trainer(**SAVE_ALL))
        before, after = At(Event.BEFORE_LOAD, batch_number), At(Event.AFTER_LOAD, batch_number)
        make_trainer(load_path="saved/ep0-ba4.pt", callbacks=[before, after])
        assert (before.answers, after.answers) == ([0], [4])


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {"cut": cut, "flipped": flipped, "empty": lambda content: b"", "garbage": lambda content: b"\x93" * 5000}


class TestDamage:
    @pytest.fixture
    def expected(self) -> dict[str, Any]:
        """The result of the whole run, of which the first half is left in ``saved``, besides ``runs/run``."""
        expected = fit(make_trainer(**SAVE_ALL, run_name="run"))
        for path in Path("saved").glob("*.pt"):
            if int(path.stem.split("-ba")[1]) > 5:
                path.unlink()
        Path("saved/latest").write_text("ep0-ba5.pt\n")
        return expected

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_the_one_before_the_newest_is_used_and_the_end_is_the_same(
        self, expected: dict[str, Any], damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = rows_of(Path("runs/run"))
        newest = Path("saved/ep0-ba5.pt")
        newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
        trainer = make_trainer(**SAVE_ALL, run_name="run", autoresume=True)
        assert trainer.state.timestamp.batch == 4
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert re.search(r"ep0-ba5\.pt cannot be loaded \(.+\): falling back to the one before", warnings[0])
        assert differences(expected, fit(trainer)) == []
        assert rows_of(Path("runs/run")) == rows

    def test_without_an_intact_checkpoint_loading_raises_and_changes_nothing(self, expected: dict[str, Any]) -> None:
        for path in Path("saved").glob("*.pt"):
            path.write_bytes(cut(path.read_bytes()))
        before = bytes_of(Path())
        with pytest.raises(
            CheckpointError, match=r"saved cannot be loaded: none of its checkpoints can be loaded: ep0-ba5"
        ):
            make_trainer(**SAVE_ALL, run_name="run", autoresume=True)
        assert bytes_of(Path()) == before

    @pytest.mark.parametrize("pointer", [None, "", "garbage", "../../etc/passwd", "ep7-ba99.pt"])
    def test_an_invalid_pointer_is_ignored(self, expected: dict[str, Any], pointer: str | None) -> None:
        if pointer is None:
            Path("saved/latest").unlink()
        else:
            Path("saved/latest").write_text(pointer)
        trainer = make_trainer(**SAVE_ALL, autoresume=True)
        assert trainer.state.timestamp.batch == 5
        assert differences(expected, fit(trainer)) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": 0.2, "scheduler": "cosine"}, "lr: 0.1 -> 0.2"),
    "weight decay": ({"weight_decay": 0.0}, "weight_decay: 0.001 -> 0.0"),
    "seed": ({"seed": 3}, "seed: 0 -> 3"),
    "batch size": ({"batch_size": 6}, "batch_size: 4 -> 6"),
    "microbatch size": ({"device_train_microbatch_size": 2}, "device_train_microbatch_size: None -> 2"),
    "precision": ({"precision": "amp_bf16"}, "precision: 'fp32' -> 'amp_bf16'"),
    "schedule": ({"total_steps": 50}, "total_steps: 40 -> 50"),
    "another model": ({"model": OtherModel}, "model: 'LinearModel' -> 'OtherModel'"),
    "a wider model": ({"model": WiderModel}, "parameters: '27 ("),
    "an algorithm": ({"algorithms": Scale(2.0)}, "algorithms.0.factor: 1.0 -> 2.0"),
    "a subclass of an algorithm": (
        {"algorithms": OtherScale()},
        "algorithms.0: Scale(factor=1.0, depends_on_duration=False) -> OtherScale(factor=1.0, ",
    ),
    "no algorithm": ({"algorithms": ()}, "algorithms: [Scale(factor=1.0, depends_on_duration=False)] -> []"),
}


class TestChangedSettings:
    @pytest.mark.parametrize("name", REFUSED)
    def test_another_training_is_refused_and_everything_stays_as_it_was(self, name: str) -> None:
        changes, message = REFUSED[name]
        changes = dict(changes)
        is_cosine = changes.pop("scheduler", None) is not None

        def settings(lr: float = 0.1, weight_decay: float = 1e-3, model: Any = LinearModel, **more: Any) -> Any:
            torch.manual_seed(1)
            made = model()
            optimizer = SGD(made.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
            scheduler = CosineAnnealingLR(optimizer, 50) if is_cosine else None
            return {"model": made, "optimizer": optimizer, "scheduler": scheduler, **more}

        fit(make_trainer(**settings(), **SAVE_ALL, run_name="run"))
        changed = settings(**changes)
        changed["model"](next(iter(vectors()))).sum().backward()
        changed["optimizer"].step()
        kept = {
            "model": {key: value.clone() for key, value in changed["model"].state_dict().items()},
            "momentum": [state["momentum_buffer"].clone() for state in changed["optimizer"].state.values()],
            "groups": [{**group, "params": None} for group in changed["optimizer"].state_dict()["param_groups"]],
        }
        before = bytes_of(Path())
        with pytest.raises(ValueError, match="the settings must be those of the run that is resumed") as caught:
            make_trainer(**changed, **SAVE_ALL, run_name="run", autoresume=True)
        assert message in str(caught.value)
        assert any("load_weights_only=True" in note for note in caught.value.__notes__)
        assert any("while loading " in note and "saved" in note for note in caught.value.__notes__)
        assert bytes_of(Path()) == before
        now = {
            "model": dict(changed["model"].state_dict()),
            "momentum": [state["momentum_buffer"] for state in changed["optimizer"].state.values()],
            "groups": [{**group, "params": None} for group in changed["optimizer"].state_dict()["param_groups"]],
        }
        differing = [place for place in differences(kept, now) if not re.search("lr|momentum$", place)]
        assert differing == []  # but for what the scheduler did when it was made

    def test_the_drop_rate_is_one_of_them(self) -> None:
        fit(make_resnet_trainer(save_folder="saved", max_duration="1ba"))
        with pytest.raises(ValueError, match=r"drop_rate: 0\.5 -> 0\.3"):
            self.with_drop_rate(0.3)

    def with_drop_rate(self, rate: float) -> None:
        network = make_model()
        optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        Trainer(
            network,
            DataLoader(NoisyImages(), BATCH_SIZE, shuffle=True),
            None,
            "1ba",
            algorithms=[StochasticDepth(drop_rate=rate, drop_warmup="0.5dur"), LabelSmoothing(0.1)],
            optimizers=optimizer,
            schedulers=OneCycleLR(optimizer, max_lr=0.1, total_steps=NUM_STEPS),
            progress_bar=False,
            load_path="saved",
        )

    def test_all_changes_are_named_in_one_message(self) -> None:
        fit(make_trainer(**SAVE_ALL))
        with pytest.raises(ValueError) as caught:
            make_trainer(load_path="saved", seed=3, weight_decay=0.0, batch_size=6, precision="amp_bf16")
        for name in ("seed: 0 -> 3", "weight_decay: 0.001 -> 0.0", "batch_size: 4 -> 6", "precision: 'fp32'"):
            assert name in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"eval_interval": "2ba"}, "eval_interval: '1ep' -> '2ba'"),
            ({"deterministic_mode": True}, "deterministic_mode: False -> True"),
            ({"max_duration": "3ep"}, "max_duration: '2ep' -> '3ep'"),
        ],
    )
    def test_settings_that_do_not_affect_steps_may_change_and_are_logged(
        self, settings: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        fit(make_trainer(**SAVE_ALL))
        expected = fit(make_trainer(**settings))
        caplog.clear()
        result = fit(make_trainer(load_path="saved/ep0-ba4.pt", **settings))
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            f"resuming with other settings: {message}"
        ]
        assert differences(expected, result) == []

    def test_the_same_settings_are_resumed_without_a_warning(self, caplog: pytest.LogCaptureFixture) -> None:
        fit(make_trainer(**SAVE_ALL))
        fit(make_trainer(load_path="saved/ep0-ba4.pt"))
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []

    def test_a_finished_run_may_be_made_longer(self) -> None:
        fit(make_trainer(**SAVE_ALL))
        trainer = make_trainer(**SAVE_ALL, autoresume=True, max_duration="3ep")
        assert trainer.state.timestamp.batch == 12
        assert differences(fit(make_trainer(max_duration="3ep")), fit(trainer)) == []

    def test_another_duration_is_refused_where_an_algorithm_depends_on_it(self) -> None:
        algorithms = Scale(depends_on_duration=True)
        fit(make_trainer(**SAVE_ALL, algorithms=algorithms))
        with pytest.raises(ValueError, match="changed: max_duration: '2ep' -> '3ep'"):
            make_trainer(load_path="saved", algorithms=algorithms, max_duration="3ep")
        fit(make_resnet_trainer(save_folder="warm", max_duration="1ba"))  # with drop_warmup="0.5dur"
        with pytest.raises(ValueError, match="changed: max_duration: '1ba' -> '2ba'"):
            make_resnet_trainer(load_path="warm", max_duration="2ba")

    def test_callbacks_may_be_added_and_removed(self) -> None:
        expected = fit(make_trainer(callbacks=[CheckpointSaver("saved", "1ba", num_to_keep=-1), Counts()]))
        fewer = fit(make_trainer(load_path="saved/ep0-ba4.pt"))
        more = make_trainer(
            load_path="saved/ep0-ba4.pt", callbacks=[Other(), Counts(), Counts()], loggers=CountingLogger()
        )
        _, known, new = more.state.callbacks
        assert isinstance(known, Counts)
        assert isinstance(new, Counts)
        assert (known.steps, new.steps) == (4, 0)
        assert differences(expected, fewer) == differences(expected, fit(more)) == []
        assert (known.steps, new.steps) == (12, 8)


class Counts(Callback):
    """Counts steps, and keeps the count in checkpoints."""

    def __init__(self) -> None:
        self.steps = 0

    def batch_end(self, state: Any, logger: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


class Other(Counts):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("it was not in the run before")


class CountingLogger(LoggerDestination): ...


@pytest.mark.parametrize("what", ["algorithm", "callback", "logger"])
def test_a_failure_to_load_leaves_everything_as_it_was(what: str) -> None:
    """Nothing is half resumed, whoever refuses his part."""

    class Refusing:
        kind: str

        def state_dict(self) -> dict[str, Any]:
            return {"count": 1}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            if what == self.kind:
                raise RuntimeError("not mine")

    class Part(Refusing, Scale):
        kind = "algorithm"

    class Watcher(Refusing, Counts):
        kind = "callback"

    class Destination(Refusing, LoggerDestination):
        kind = "logger"

    def settings() -> dict[str, Any]:
        return {"algorithms": Part(), "callbacks": Watcher(), "loggers": Destination(), "run_name": "run"}

    fit(make_trainer(**SAVE_ALL, **settings()))
    torch.manual_seed(0)
    model = LinearModel()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=40)
    kept = {key: value.clone() for key, value in model.state_dict().items()}, scheduler.state_dict().copy()
    before, groups = bytes_of(Path()), [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="the checkpoint does not hold what a run needs: RuntimeError"):
        make_trainer(model, optimizer=optimizer, scheduler=scheduler, **SAVE_ALL, **settings(), autoresume=True)
    assert differences(kept, (dict(model.state_dict()), scheduler.state_dict())) == []
    assert optimizer.state_dict()["state"] == {}
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert bytes_of(Path()) == before
