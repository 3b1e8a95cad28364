"""Models converted with `cf.apply_stochastic_depth` in a Trainer."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import etude.functional as cf
from etude import Algorithm, Callback, Event, Trainer
from etude.algorithms import StochasticDepth
from etude.models import ComposerClassifier
from etude.trainer import CheckpointSaver
from helpers.networks import images, tiny_resnet
from helpers.parallel_training import assert_same_on_all_ranks, make_model, refused
from helpers.ranks import on_ranks
from helpers.resumable import differences, result_of

SETTINGS: list[dict[str, Any]] = [
    {"drop_rate": 0.5},
    {"drop_rate": 0.5, "stochastic_method": "sample"},
    {"drop_rate": 0.4, "draws": "balanced", "scaling": "training", "seed": 7},
]


class At(Algorithm):
    """Calls a function with the state at one event."""

    def __init__(self, event: Event, function: Callable[[Any], Any]) -> None:
        self._event, self._function = event, function

    def match(self, event: Event, state: Any) -> bool:
        return event is self._event

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self._function(state)


class RecordPlans(Algorithm):
    """Keeps what is dropped in each microbatch."""

    def __init__(self) -> None:
        self._plans: list[tuple[int, Any]] = []

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.AFTER_FORWARD

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        plan = cf.stochastic_blocks(state.model)[0].drop_plan
        self._plans.append((int(state.timestamp.batch), plan.decisions.tolist()))


def build(functional: bool, settings: dict[str, Any], *algorithms: Algorithm, **options: Any) -> Trainer:
    torch.manual_seed(3)
    model = tiny_resnet()
    if functional:
        cf.apply_stochastic_depth(model, **settings)
    else:
        algorithms = (StochasticDepth(**settings), *algorithms)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = images(18, 4, shuffle=True)
    return Trainer(model, data, None, "2ep", algorithms, optimizer, progress_bar=False, **options)


def train(functional: bool, settings: dict[str, Any], *algorithms: Algorithm, **options: Any) -> dict[str, Any]:
    trainer = build(functional, settings, *algorithms, **options)
    trainer.fit()
    trainer.close()
    return result_of(trainer)


@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_trains_as_the_class_and_all_microbatches_share_a_plan(settings: dict[str, Any], size: int | None) -> None:
    plans = RecordPlans(), RecordPlans()
    one, other = (
        train(functional, settings, plans[functional], device_train_microbatch_size=size, seed=5)
        for functional in (False, True)
    )
    assert differences(one, other) == []
    assert plans[0]._plans == plans[1]._plans
    by_step: dict[int, list[Any]] = {}
    for step, plan in plans[1]._plans:
        by_step.setdefault(step, []).append(plan)
    assert all(plan == of_step[0] for of_step in by_step.values() for plan in of_step)
    assert len({str(of_step[0]) for of_step in by_step.values()}) > 3


def test_by_default_the_plans_follow_the_seed_of_the_run() -> None:
    plans = [RecordPlans() for _ in range(3)]
    for record, seed in zip(plans, (1, 1, 2), strict=True):
        train(True, SETTINGS[0], record, seed=seed)
    assert plans[0]._plans == plans[1]._plans
    assert plans[0]._plans != plans[2]._plans


def test_the_settings_contain_it_as_they_contain_the_class() -> None:
    for settings in SETTINGS:
        one, other = (build(functional, settings).state.settings for functional in (False, True))
        assert one == other
        assert one["algorithms"][0]["drop_rate"] == settings["drop_rate"]


def save_every_step(settings: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    return train(True, settings, callbacks=CheckpointSaver(folder, "1ba", num_to_keep=-1), **options)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_resume_from_any_step_is_bit_exact(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = save_every_step(settings, tmp_path, device_train_microbatch_size=2)
    paths = sorted(tmp_path.glob("*.pt"))
    assert len(paths) == 12  # the end of each epoch has one of its own
    for path in paths:
        resumed = build(True, settings, load_path=path, device_train_microbatch_size=2)
        resumed.fit()
        resumed.close()
        assert differences(expected, result_of(resumed)) == [], path.name


def test_a_change_of_its_settings_is_refused_by_name(tmp_path: Path) -> None:
    save_every_step(SETTINGS[0], tmp_path)
    for change in ({"drop_rate": 0.25}, {"draws": "balanced"}, {"seed": 3}, {"stochastic_method": "sample"}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"the settings must be those of the run that is resumed.*{name}"):
            build(True, {**SETTINGS[0], **change}, load_path=tmp_path)
    with pytest.raises(ValueError, match="the settings must be those of the run that is resumed, changed: algorithms"):
        Trainer(tiny_resnet(), images(18, 4, shuffle=True), None, "2ep", load_path=tmp_path, progress_bar=False)


def test_rates_set_by_hand_count_and_are_compared_at_a_resume(tmp_path: Path) -> None:
    def make(rate: float, **options: Any) -> Trainer:
        model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=0.5)
        cf.stochastic_blocks(model)[0].drop_rate = rate
        return Trainer(model, images(), None, "1ep", progress_bar=False, **options)

    trainer = make(1.0, save_folder=tmp_path)
    trainer.fit()
    (depth,) = trainer.state.algorithms
    assert isinstance(depth, StochasticDepth)
    assert depth.realized_drop_rates[0] == 1.0
    make(1.0, load_path=tmp_path).fit()
    with pytest.raises(ValueError, match=r"that of block 0 was 1, got 0\.9"):
        make(0.9, load_path=tmp_path)


def test_a_model_whose_own_rates_changed_is_refused_at_a_resume(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    def make(rate: float, **options: Any) -> Trainer:
        network = timm.create_model("test_vit", num_classes=3, drop_path_rate=rate, img_size=32)
        data = images(8, 4, size=32)
        return Trainer(
            ComposerClassifier(network, 3), data, None, "1ep", StochasticDepth(), progress_bar=False, **options
        )

    make(0.2, save_folder=tmp_path).fit()
    with pytest.raises(ValueError, match="the drop rates must be those of the run that is resumed"):
        make(0.3, load_path=tmp_path)


def test_after_the_run_the_model_draws_in_your_own_loop_again() -> None:
    settings = {"drop_rate": 0.5, "drop_distribution": "uniform"}
    trainer = build(True, settings)
    trainer.fit()
    untouched = cf.apply_stochastic_depth(tiny_resnet(), **settings)
    x, _ = next(iter(images()))
    plans: tuple[list[Any], list[Any]] = ([], [])
    for model, found in zip((trainer.state.model, untouched), plans, strict=True):
        model.train()
        for _ in range(5):
            model((x, None))
            found.append(cf.stochastic_blocks(model)[0].drop_plan.decisions.tolist())
    assert plans[0] == plans[1]
    cf.stochastic_blocks(trainer.state.model)[0].drop_rate = 0.1
    with pytest.raises(RuntimeError, match="drop_rate of a block must be set before the Trainer is built"):
        trainer.fit("1ep")


def test_after_an_error_in_a_step_no_old_plan_is_used() -> None:
    def fail(state: Any) -> None:
        raise KeyboardInterrupt

    trainer = build(True, SETTINGS[1], At(Event.BEFORE_LOSS, fail))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    model = trainer.state.model
    for num_rows in (3, 5):  # the plan of the step is for four rows
        model((torch.randn(num_rows, 3, 8, 8), None))


def test_a_second_trainer_trains_the_model_as_the_first() -> None:
    expected = train(True, SETTINGS[0])
    trainer = build(True, SETTINGS[0])
    model = trainer.state.model
    again = Trainer(
        model,
        images(18, 4, shuffle=True),
        None,
        "2ep",
        optimizers=SGD(model.parameters(), lr=0.05, momentum=0.9),
        progress_bar=False,
    )
    again.fit()
    assert differences(expected["model"], result_of(again)["model"]) == []
    assert differences(expected["algorithms"], result_of(again)["algorithms"]) == []


def test_the_class_beside_the_functional_form_is_refused() -> None:
    with pytest.raises(ValueError, match="model has stochastic depth already"):
        build(True, SETTINGS[0], StochasticDepth())


def test_an_algorithm_may_apply_it_at_init() -> None:
    def apply(state: Any) -> None:
        cf.apply_stochastic_depth(state.model, drop_rate=0.5)

    torch.manual_seed(3)
    model = tiny_resnet()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = images(18, 4, shuffle=True)
    trainer = Trainer(model, data, None, "2ep", At(Event.INIT, apply), optimizer, progress_bar=False)
    assert [type(algorithm).__name__ for algorithm in trainer.state.algorithms] == ["StochasticDepth", "At"]
    trainer.fit()
    assert differences(result_of(trainer)["model"], train(False, {"drop_rate": 0.5})["model"]) == []


@pytest.mark.parametrize("event", [Event.FIT_START, Event.EPOCH_START])
def test_applied_after_init_it_is_refused(event: Event) -> None:
    class Late(Callback):
        def run_event(self, at: Event, state: Any, logger: Any) -> None:
            if at is event:
                cf.apply_stochastic_depth(state.model)

    trainer = Trainer(tiny_resnet(), images(), None, "1ep", callbacks=Late(), progress_bar=False)
    with pytest.raises(RuntimeError, match="the functional form of StochasticDepth must be applied before the Trainer"):
        trainer.fit()


def test_applied_in_the_middle_of_an_epoch_it_is_refused_at_the_next_save(tmp_path: Path) -> None:
    class Late(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == 2:
                cf.apply_stochastic_depth(state.model)

    options: dict[str, Any] = {"save_folder": tmp_path, "save_interval": "1ba", "progress_bar": False}
    trainer = Trainer(tiny_resnet(), images(), None, "1ep", callbacks=Late(), **options)
    with pytest.raises(RuntimeError, match="the functional form of StochasticDepth must be applied before the Trainer"):
        trainer.fit()
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ep0-ba0.pt", "ep0-ba1.pt"]


def test_rates_cannot_be_set_during_fit() -> None:
    def set_rate(state: Any) -> None:
        cf.stochastic_blocks(state.model)[0].drop_rate = 0.9

    with pytest.raises(RuntimeError, match=r"drop_rate must not be set during Trainer\.fit"):
        build(True, SETTINGS[0], At(Event.BATCH_END, set_rate)).fit()


def test_a_forward_outside_of_the_forward_of_the_step_is_refused() -> None:
    def forward(state: Any) -> None:
        state.model(state.batch)

    with pytest.raises(RuntimeError, match=r"during Trainer\.fit the model may run in training mode between"):
        build(True, SETTINGS[0], At(Event.BATCH_START, forward)).fit()


def test_an_algorithm_that_replaces_the_model_after_it_is_refused() -> None:
    def replace(state: Any) -> None:
        state.model = tiny_resnet()

    model = tiny_resnet()
    trainer = Trainer(model, images(), None, "1ep", [StochasticDepth(), At(Event.INIT, replace)], progress_bar=False)
    with pytest.raises(RuntimeError, match="an algorithm that replaces the model must come before it"):
        trainer.fit()


class TwoForwards(nn.Module):
    """R-Drop (Liang et al. 2021): the loss runs the model again, and compares the two outputs."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.network, self.fails = tiny_resnet(), fails
        self.plans: list[Any] = []

    def forward(self, batch: Any) -> Tensor:
        outputs: Tensor = self.network(batch)
        self.plans.append(cf.stochastic_blocks(self)[0].drop_plan.decisions.tolist())
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        again = self(batch)
        if self.fails:
            raise ArithmeticError
        return nn.functional.cross_entropy(outputs, batch[1]) + (outputs - again).square().mean()


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_loss_that_runs_the_model_again_uses_the_plan_of_its_step(functional: bool, method: Any) -> None:
    model, settings = TwoForwards(), {"drop_rate": 0.5, "stochastic_method": method}
    algorithms = [] if functional else [StochasticDepth(**settings)]
    if functional:
        cf.apply_stochastic_depth(model, **settings)
    trainer = Trainer(model, images(), None, "2ep", algorithms, device_train_microbatch_size=2, progress_bar=False)
    trainer.fit()
    assert len(model.plans) == 2 * 2 * 8
    assert model.plans[::2] == model.plans[1::2]
    failing = Trainer(TwoForwards(fails=True), images(), None, "1ep", StochasticDepth(), progress_bar=False)
    with pytest.raises(ArithmeticError):
        failing.fit()
    failed: Any = failing.state.model
    with pytest.raises(RuntimeError, match="no drop plan was drawn for this forward in training"):
        failed(next(iter(images())))


def test_evaluation_and_prediction_alone_use_the_rates(tmp_path: Path) -> None:
    model = cf.apply_stochastic_depth(tiny_resnet(), drop_rate=0.5)
    trainer = Trainer(model, eval_dataloader=images(), progress_bar=False)
    before = trainer.eval()
    predicted = torch.cat(trainer.predict(images()))
    model.eval()
    assert torch.equal(predicted, torch.cat([model(batch) for batch in images()]))
    cf.remove_stochastic_depth(model)
    assert trainer.eval() != before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_brings_its_own_algorithm_along(copied: Any) -> None:
    model = cf.apply_stochastic_depth(
        tiny_resnet(), drop_rate=0.5, drop_distribution=lambda block, count: block / count
    )
    twin = copied(model)
    trainers = [Trainer(one, images(), None, "1ep", progress_bar=False) for one in (model, twin)]
    plans = [trainer.state.algorithms[0].plan for trainer in trainers]  # type: ignore[attr-defined]
    assert plans[0] is not plans[1]
    assert trainers[0].state.settings["algorithms"] == trainers[1].state.settings["algorithms"]
    assert trainers[0].state.settings["algorithms"][0]["drop_distribution"] == [0.25, 0.5, 0.75, 1.0]
    trainers[1].fit()
    assert cf.stochastic_blocks(twin)[0].drop_plan is plans[1]


def test_a_copy_made_during_a_run_belongs_to_no_trainer() -> None:
    copies: list[Any] = []

    def keep(state: Any) -> None:
        copies.append(copy.deepcopy(state.model))

    build(True, SETTINGS[0], At(Event.AFTER_FORWARD, keep)).fit()
    copies[0].train()(next(iter(images())))


def test_removed_it_leaves_nothing_for_a_trainer() -> None:
    model = cf.remove_stochastic_depth(cf.apply_stochastic_depth(tiny_resnet()))
    assert Trainer(model, images(), None, "1ep", progress_bar=False).state.algorithms == ()


@on_ranks(2)
@pytest.mark.parametrize("settings", [*SETTINGS, {"use_same_gpu_seed": False, "draws": "balanced"}], ids=str)
def test_on_two_ranks_it_trains_as_the_class_and_resumes_bit_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    one, other = (train(functional, settings) for functional in (False, True))
    assert differences(one, other) == []
    expected = save_every_step(settings, tmp_path)
    resumed = build(True, settings, load_path=tmp_path / "ep1-ba7.pt")
    resumed.fit()
    resumed.close()
    assert_same_on_all_ranks(resumed.state.model)
    result = result_of(resumed)
    assert differences(expected["algorithms"], result["algorithms"]) == []
    if torch.distributed.get_rank() == 0:  # whose running statistics the checkpoint holds
        assert differences(expected, result) == []


@on_ranks(2)
def test_two_ranks_with_other_settings_are_refused_by_name() -> None:
    rate = 0.5 if torch.distributed.get_rank() == 0 else 0.4
    with refused("all ranks must have the same settings, rank 1 differs from rank 0 in algorithms.0.drop_rate"):
        Trainer(cf.apply_stochastic_depth(make_model(), drop_rate=rate), images(), None, "1ep", progress_bar=False)
