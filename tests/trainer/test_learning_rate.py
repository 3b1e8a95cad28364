"""Learning rate schedules in a Trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

from etude import Callback, Logger, State, Trainer
from etude.algorithms import StochasticDepth
from etude.callbacks import LRMonitor
from etude.loggers import InMemoryLogger
from etude.optim import CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler, LinearScheduler
from helpers.networks import LinearModel, images, tiny_resnet, vectors


class Crash(Callback):
    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def batch_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            raise KeyboardInterrupt


def make_trainer(schedulers: Any, *callbacks: Callback, lr: Any = 0.1, **settings: Any) -> Trainer:
    """Two epochs of 6 batches."""
    torch.manual_seed(0)
    model = LinearModel()
    optimizer = settings.pop("optimizer", lambda parameters: SGD(parameters, lr=lr, momentum=0.9))(model.parameters())
    made = schedulers(optimizer) if settings.pop("is_made", False) else schedulers
    settings = {"max_duration": "2ep", "progress_bar": False, "device": "cpu", **settings}
    return Trainer(model, vectors(), optimizers=optimizer, schedulers=made, callbacks=callbacks, **settings)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.state.model.parameters()]


def rates(trainer: Trainer, name: str = "lr-SGD/group0") -> list[float]:
    logger = trainer.logger.destinations[0]
    assert isinstance(logger, InMemoryLogger)
    return [float(value) for _, value in logger.data[name]]


def test_it_trains_as_the_scheduler_of_torch_stepped_per_batch() -> None:
    ours = make_trainer(CosineAnnealingScheduler(alpha_f=0.1))
    ours.fit()
    theirs = make_trainer(
        lambda optimizer: CosineAnnealingLR(optimizer, 12, 0.01), is_made=True, step_schedulers_every_batch=True
    )
    theirs.fit()
    for one, other in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=0)


@pytest.mark.parametrize("schedulers", [lambda state: 0.5 ** int(state.timestamp.batch), LinearScheduler(1.0, 0.2)])
def test_it_trains_bit_for_bit_as_a_lambda_of_torch(schedulers: Callable[[State], float]) -> None:
    ours = make_trainer(schedulers)
    ours.fit()
    expected = [0.5**batch for batch in range(13)]
    if isinstance(schedulers, LinearScheduler):
        expected = [1.0 + (0.2 - 1.0) * min(1.0, batch / 12) for batch in range(13)]
    theirs = make_trainer(
        lambda optimizer: LambdaLR(optimizer, lambda batch: expected[batch]),
        is_made=True,
        step_schedulers_every_batch=True,
    )
    theirs.fit()
    assert all(map(torch.equal, weights(ours), weights(theirs)))


def test_factors_multiply_and_every_group_keeps_its_own_initial_rate() -> None:
    def groups(parameters: Any) -> Optimizer:
        weight, bias = parameters
        return SGD([{"params": [weight], "lr": 0.4}, {"params": [bias], "lr": 0.1}])

    schedulers = [lambda state: 0.5, lambda state: 1.0 / (1 + state.timestamp.batch)]
    trainer = make_trainer(schedulers, LRMonitor(), optimizer=groups, max_duration="3ba", loggers=InMemoryLogger())
    trainer.fit()
    assert rates(trainer) == pytest.approx([0.2, 0.1, 0.2 / 3])
    assert rates(trainer, "lr-SGD/group1") == pytest.approx([0.05, 0.025, 0.05 / 3])
    assert [group["initial_lr"] for group in trainer.state.optimizers[0].param_groups] == [0.4, 0.1]


def test_a_learning_rate_that_is_a_tensor_is_changed_in_place() -> None:
    rate = torch.tensor(0.1)
    trainer = make_trainer(lambda state: 0.5, lr=rate, max_duration="2ba")
    trainer.fit()
    assert trainer.state.optimizers[0].param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.05)


def test_all_optimizers_are_driven() -> None:
    model = LinearModel()
    weight, bias = model.parameters()
    optimizers = [SGD([weight], lr=0.1), AdamW([bias], lr=0.2)]
    trainer = Trainer(
        model,
        vectors(),
        max_duration="1ba",
        optimizers=optimizers,
        schedulers=lambda state: 0.5,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == pytest.approx([0.05, 0.1])


def test_the_rate_of_the_step_is_set_before_batch_start() -> None:
    seen: list[float] = []

    class See(Callback):
        def batch_start(self, state: State, logger: Logger) -> None:
            seen.append(state.optimizers[0].param_groups[0]["lr"])

    make_trainer(CosineAnnealingWithWarmupScheduler("3ba"), See(), max_duration="4ba").fit()
    assert seen == pytest.approx([0, 0.1 / 3, 0.2 / 3, 0.1])


@pytest.mark.parametrize("crash_at", [1, 5, 6, 9])
@pytest.mark.parametrize(
    "schedulers",
    [CosineAnnealingWithWarmupScheduler("0.25dur", alpha_f=0.1), lambda state: 1 / (1 + int(state.timestamp.batch))],
)
def test_a_resumed_run_equals_an_uninterrupted_one(schedulers: Any, crash_at: int, tmp_path: Path) -> None:
    unbroken = make_trainer(schedulers, LRMonitor(), loggers=InMemoryLogger())
    unbroken.fit()
    saving: dict[str, Any] = {"save_folder": tmp_path, "save_interval": "1ba"}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(schedulers, LRMonitor(), Crash(crash_at), loggers=InMemoryLogger(), **saving).fit()
    resumed = make_trainer(schedulers, LRMonitor(), loggers=InMemoryLogger(), autoresume=True, **saving)
    assert resumed.state.timestamp.batch == crash_at
    resumed.fit()
    assert all(map(torch.equal, weights(unbroken), weights(resumed)))
    assert rates(resumed) == rates(unbroken)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedulers": CosineAnnealingScheduler(alpha_f=0.2)}, r"schedulers.0.alpha_f: 0.1 -> 0.2"),
        ({"schedulers": LinearScheduler()}, "schedulers.0"),
        ({"max_duration": "3ep"}, "max_duration: '2ep' -> '3ep'"),
    ],
)
def test_a_resume_with_another_schedule_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedulers": CosineAnnealingScheduler(alpha_f=0.1), "save_folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(settings.pop("schedulers"), Crash(7), **settings).fit()
    settings = {"schedulers": CosineAnnealingScheduler(alpha_f=0.1), **settings, **changed}
    with pytest.raises(ValueError, match=message):
        make_trainer(settings.pop("schedulers"), autoresume=True, **settings)


def test_another_duration_is_accepted_where_the_schedule_does_not_depend_on_it(tmp_path: Path) -> None:
    schedule = CosineAnnealingScheduler("12ba")
    make_trainer(schedule, save_folder=tmp_path).fit()
    make_trainer(schedule, save_folder=tmp_path, max_duration="3ep", autoresume=True).fit()


def test_it_composes_with_stochastic_depth_and_microbatches() -> None:
    seen: list[float] = []

    class See(Callback):
        def after_train_batch(self, state: State, logger: Logger) -> None:
            seen.append(state.optimizers[0].param_groups[0]["lr"])

    model = tiny_resnet()
    trainer = Trainer(
        model,
        images(),
        max_duration="1ep",
        algorithms=StochasticDepth(drop_rate=0.5),
        optimizers=SGD(model.parameters(), lr=0.1),
        schedulers=LinearScheduler(1.0, 0.0),
        callbacks=See(),
        device_train_microbatch_size=2,
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])


class TestRefused:
    def test_a_schedule_longer_than_the_training(self) -> None:
        with pytest.raises(ValueError, match=r't_max of a .* must not be longer than the training, max_duration="2ep"'):
            make_trainer(CosineAnnealingScheduler("3ep"))

    def test_both_kinds_of_schedulers(self) -> None:
        with pytest.raises(ValueError, match="schedulers must be either LRScheduler objects or functions of the state"):
            make_trainer(lambda optimizer: [ExponentialLR(optimizer, 0.9), LinearScheduler()], is_made=True)

    @pytest.mark.parametrize("schedulers", [0.1, LinearScheduler, [None]])
    def test_invalid_schedulers_are_refused(self, schedulers: Any) -> None:
        with pytest.raises(TypeError, match="schedulers must be LRScheduler objects or functions of the state, got"):
            make_trainer(schedulers)

    @pytest.mark.parametrize(
        ("factor", "error"), [(None, TypeError), (-0.5, ValueError), (math.nan, ValueError), ("fast", TypeError)]
    )
    def test_an_invalid_factor_is_refused(self, factor: Any, error: type[Exception]) -> None:
        def schedule(state: State) -> Any:
            return factor

        with pytest.raises(error, match=f"schedule returned {factor!r}"):
            make_trainer(schedule).fit()
