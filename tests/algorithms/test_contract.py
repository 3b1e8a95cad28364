"""Contract tests for every algorithm and probe, alone and in pairs. `helpers.battery` lists them."""

import inspect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import etude
from etude import Algorithm, Event, State, algorithms
from etude.engine.identity import describe, find_opaque
from etude.trainer import CheckpointSaver
from helpers.battery import BATTERY, Together, make_model, make_trainer, result_of, sgd
from helpers.networks import images
from helpers.ranks import run_on_ranks
from helpers.resumable import differences

NAMES = list(BATTERY)
OURS = [name for name in NAMES if BATTERY[name].kind.__module__.startswith("etude.")]
EXCLUDED = [(name, name) for name in NAMES if BATTERY[name].only_once]
EXCLUDED += [pair for name in NAMES for other in BATTERY[name].excludes for pair in ((name, other), (other, name))]
MISPLACED = [(name, other) for name in NAMES for other in BATTERY[name].follows]
PAIRS = [pair for pair in itertools.product(NAMES, NAMES) if pair not in (*EXCLUDED, *MISPLACED)]


class Watch(Algorithm):
    """The first algorithm of a run: it acts before all others where something begins, and after them where it ends."""

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._weights: dict[str, Tensor] = {}
        self.num_batches = self.num_losses = self.num_evaluations = 0

    def match(self, event: Event, state: State) -> bool:
        watched = (Event.BATCH_START, Event.BEFORE_LOSS, Event.AFTER_LOSS, Event.BATCH_END)
        return event in (*watched, Event.EVAL_START, Event.EVAL_END)

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event in (Event.BATCH_START, Event.BEFORE_LOSS):
            self._batches.append((state.batch, [tensor.clone() for tensor in state.batch]))
        elif event in (Event.AFTER_LOSS, Event.BATCH_END):
            batch, values = self._batches.pop()
            assert state.batch is batch, f"{event}: the batch must be the object that it was before"
            assert differences(values, list(state.batch)) == [], f"{event}: the batch must not be changed in place"
        if event is Event.AFTER_LOSS:
            assert isinstance(state.loss, Tensor)
            assert state.loss.dim() == 0
            assert state.loss.isfinite()
            assert state.loss.requires_grad
            self.num_losses += 1
        elif event is Event.BATCH_END:
            assert state.model.training
            self.num_batches += 1
        elif event is Event.EVAL_START:
            self._weights = {name: tensor.detach().clone() for name, tensor in state.model.state_dict().items()}
        elif event is Event.EVAL_END:
            assert differences(self._weights, dict(state.model.state_dict())) == []
            self.num_evaluations += 1


def make(*names: str) -> list[Algorithm]:
    return [BATTERY[name].make() for name in names]


def check_training(names: Sequence[str], **settings: Any) -> None:
    watch = Watch()
    trainer = make_trainer([watch, *make(*names)], **settings)
    keys = list(trainer.state.model.state_dict())
    trainer.fit()
    assert (watch.num_batches, watch.num_evaluations) == (6, 2)
    num_passes = max(BATTERY[name].num_passes for name in names)
    assert watch.num_losses == 6 * num_passes * (4 // settings.get("device_train_microbatch_size", 4))
    assert list(trainer.state.model.state_dict()) == keys
    trained = dict(trainer.state.model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in trained.values())
    assert (
        max(
            float((p - q).detach().abs().max())
            for p, q in zip(trained.values(), make_model().parameters(), strict=True)
        )
        > 1e-3
    )
    trainer.close()


def check_resume(names: Sequence[str], folder: Path, **settings: Any) -> None:
    """A resume in the middle of an epoch and one at its end give every bit of the uninterrupted run."""
    whole = make_trainer(make(*names), callbacks=CheckpointSaver(folder, "1ba", num_to_keep=-1), **settings)
    whole.fit()
    expected = result_of(whole)
    whole.close()
    for path in ("ep0-ba3.pt", "ep1-ba4.pt"):
        resumed = make_trainer(make(*names), load_path=folder / path, **settings)
        assert resumed.state.timestamp.batch == int(path[6])
        resumed.fit()
        assert differences(expected, result_of(resumed)) == [], path
        resumed.close()


@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_and_restores_batch_loss_and_model(name: str, size: int) -> None:
    check_training([name], device_train_microbatch_size=size)


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    check_resume([name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_pairs_train_and_resume_in_both_orders(names: tuple[str, str], tmp_path: Path) -> None:
    check_training(names)
    check_resume(names, tmp_path)


@pytest.mark.parametrize("names", EXCLUDED, ids="-".join)
def test_algorithms_that_exclude_each_other_are_refused_by_name_before_the_model_is_changed(
    names: tuple[str, str],
) -> None:
    model = make_model()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=rf"a run must have at most one .*({'|'.join(names)})"):
        make_trainer(make("StochasticDepth" if "StochasticDepth" not in names else "EMA", *names), model)
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("names", MISPLACED, ids="-".join)
def test_an_order_that_makes_no_sense_is_refused_by_name(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{names[0]} must come after {names[1]} among the algorithms"):
        make_trainer(make(*names))
    make_trainer(make(*reversed(names))).close()


@pytest.mark.parametrize("mixing", ["MixUp", "CutMix", "ChangeBatch"])
def test_algorithms_that_change_the_batch_restore_it_together(mixing: str) -> None:
    check_training(["LabelSmoothing", mixing, "LabelSmoothing", "ChangeBatch"], device_train_microbatch_size=2)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_part_of_the_identity(name: str) -> None:
    entry = BATTERY[name]
    assert set(entry.changes) == set(inspect.signature(entry.kind).parameters), "the table lacks settings"
    own = describe(entry.make())
    assert own == describe(entry.make())
    assert find_opaque(own) == []
    for setting, value in entry.changes.items():
        settings = value if isinstance(value, Together) else {setting: value}
        changed = describe(entry.make(**settings))
        assert {key for key in own if own[key] != changed[key]} == set(settings)
        assert find_opaque(changed) == []


@pytest.mark.parametrize("name", NAMES)
def test_its_representation_names_every_setting(name: str) -> None:
    entry = BATTERY[name]
    text = repr(entry.make())
    assert text.startswith(f"{entry.kind.__name__}(")
    assert all(f"{setting}=" in text for setting in entry.changes)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_explains_every_setting(name: str) -> None:
    entry = BATTERY[name]
    if name not in OURS or name == "StochasticDepth":  # whose settings are documented once, in Settings
        return
    for setting in entry.changes:
        assert f"\n    {setting}: " in (inspect.getdoc(entry.kind) or ""), setting


class RecordBatches(Algorithm):
    """Keeps the batches of a run as the dataloader gave them."""

    def __init__(self) -> None:
        self._batches: list[Any] = []

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_START

    def apply(self, event: Event, state: State, logger: Any) -> None:
        self._batches.append(tuple(tensor.clone() for tensor in state.batch))


@pytest.mark.parametrize("name", [name for name in NAMES if BATTERY[name].by_hand is not None])
def test_the_functional_form_equals_the_class(name: str) -> None:
    by_hand = BATTERY[name].by_hand
    assert by_hand is not None
    record = RecordBatches()
    trainer = make_trainer([record, *make(name)], eval_dataloader=None)
    trainer.fit()
    model = make_model()
    by_hand(model, sgd(model), record._batches)
    assert len(record._batches) == 6
    assert differences(dict(trainer.state.model.state_dict()), dict(model.state_dict())) == []
    trainer.close()


def train_on_ranks(name: str, folder: Path) -> None:
    """Copies and shards give the same bits, and the shards resume."""
    copies = make_trainer(make(name), make_model(frozen_batchnorm=True))
    copies.fit()
    result = result_of(copies)
    if BATTERY[name].shards:
        sharded = make_trainer(make(name), make_model(frozen_batchnorm=True), parallelism="fsdp")
        sharded.fit()
        for part in ("model", "algorithms"):
            if BATTERY[name].shards_to_the_bit:
                assert differences(result[part], result_of(sharded)[part]) == [], part
            else:
                torch.testing.assert_close(result_of(sharded)[part], result[part], rtol=1e-5, atol=1e-6)
        check_resume([name], folder / "saved", parallelism="fsdp")
    torch.save(result["model"], folder / f"weights{torch.distributed.get_rank()}.pt")


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "name", [name if name in OURS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_two_ranks_equal_one_and_shards_equal_copies(name: str, tmp_path: Path) -> None:
    run_on_ranks(2, train_on_ranks, name=name, folder=tmp_path)
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    assert differences(first, second) == []
    alone = make_trainer(make(name), make_model(frozen_batchnorm=True))
    alone.fit()
    largest = max(float((tensor - first[key]).abs().max()) for key, tensor in alone.state.model.state_dict().items())
    assert (largest < 1e-5) == BATTERY[name].equal_on_ranks
    alone.close()


def test_every_public_algorithm_is_in_the_battery() -> None:
    public = {name for name in algorithms.__all__ if is_algorithm(getattr(algorithms, name))}
    assert {"LabelSmoothing", "StochasticDepth"} <= public
    assert public == set(OURS)
    assert all(BATTERY[name].by_hand is not None for name in public), "an algorithm needs a functional form"


def is_algorithm(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Algorithm)


@pytest.mark.parametrize("name", OURS)
def test_the_programs_of_its_card_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(etude.__file__).parent / Path(*BATTERY[name].kind.__module__.split(".")[1:-1])
    programs = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert any(f"{name}(" in program for program in programs)
    for program in programs:
        model = make_model()
        names = {"model": model, "train_dataloader": images(num_samples=8), "optimizer": sgd(model)}
        exec(compile(program, f"{name}/README.md", "exec"), {"__name__": "card", **names})
