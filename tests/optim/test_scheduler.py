"""Learning rate schedules."""

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)
from torch.utils.data import DataLoader

from etude.engine import State, Time, Timestamp
from etude.optim import (
    ComposerScheduler,
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearScheduler,
    LinearWithWarmupScheduler,
    MultiStepScheduler,
    MultiStepWithWarmupScheduler,
)

BATCHES = 5  # per epoch
ALL = [
    ConstantScheduler(0.5, "2ep"),
    LinearScheduler(0.5, 0.1, "12ba"),
    MultiStepScheduler(["1ep", "12ba"]),
    CosineAnnealingScheduler("0.5dur"),
    ConstantWithWarmupScheduler("3ba", 0.5),
    LinearWithWarmupScheduler("1ep", 0.8, 0.1),
    MultiStepWithWarmupScheduler("3ba", ["2ep"]),
    CosineAnnealingWithWarmupScheduler("0.2dur", "3ep", 0.1),
]


def make_state(max_duration: str | None = "4ep", *, drop_last: bool = False) -> State:
    """Of a training with 18 samples in 5 batches per epoch."""
    loader: DataLoader[Any] = DataLoader(list(range(18)), batch_size=4, drop_last=drop_last)  # type: ignore[arg-type]
    duration = None if max_duration is None else Time.from_timestring(max_duration)
    return State(model=nn.Linear(1, 1), max_duration=duration, train_dataloader=loader)


def timestamps(state: State, num_batches: int) -> Iterator[int]:
    """Move the timestamp of `state` batch by batch, as the Trainer does."""
    state.timestamp = Timestamp()
    for batch in range(num_batches):
        yield batch
        rows = 2 if batch % BATCHES == BATCHES - 1 else 4
        state.timestamp = state.timestamp.to_next_batch(rows)
        if state.timestamp.batch_in_epoch == BATCHES:
            state.timestamp = state.timestamp.to_next_epoch()


def factors(schedule: ComposerScheduler, state: State, num_batches: int = 4 * BATCHES) -> list[float]:
    return [schedule(state) for _ in timestamps(state, num_batches)]


def factors_of_torch(make: Callable[[SGD], LRScheduler], num_batches: int = 4 * BATCHES) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(num_batches):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


class TestAgainstTorch:
    """Stepped once per batch, torch's schedulers give the same learning rates."""

    @pytest.mark.parametrize("time", ["7ba", "0.35dur"])
    def test_constant(self, time: str) -> None:
        expected = factors_of_torch(lambda optimizer: ConstantLR(optimizer, 0.3, 7))
        assert factors(ConstantScheduler(0.3, time), make_state()) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(("time", "batches"), [("1dur", 20), ("3ep", 15), ("7ba", 7)])
    def test_linear(self, time: str, batches: int) -> None:
        expected = factors_of_torch(lambda optimizer: LinearLR(optimizer, 0.9, 0.2, batches))
        assert factors(LinearScheduler(0.9, 0.2, time), make_state()) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("milestones", [["3ba", "2ep"], ["10ba", "0.15dur"]])
    def test_multi_step(self, milestones: list[str]) -> None:
        expected = factors_of_torch(lambda optimizer: MultiStepLR(optimizer, [3, 10], 0.3))
        assert factors(MultiStepScheduler(milestones, 0.3), make_state()) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("time", ["1dur", "4ep", "20ba"])
    def test_cosine(self, time: str) -> None:
        expected = factors_of_torch(lambda optimizer: CosineAnnealingLR(optimizer, 20, 0.1))
        assert factors(CosineAnnealingScheduler(time, 0.1), make_state()) == pytest.approx(expected, abs=1e-7)

    @pytest.mark.parametrize(
        ("schedule", "after"),
        [
            (CosineAnnealingWithWarmupScheduler("1ep", alpha_f=0.1), lambda o: CosineAnnealingLR(o, 15, 0.1)),
            (LinearWithWarmupScheduler("0.25dur", 1.0, 0.2), lambda o: LinearLR(o, 1.0, 0.2, 15)),
            (MultiStepWithWarmupScheduler("5ba", ["8ba", "3ep"], 0.5), lambda o: MultiStepLR(o, [3, 10], 0.5)),
        ],
    )
    def test_schedules_after_a_warmup(self, schedule: ComposerScheduler, after: Callable[[SGD], LRScheduler]) -> None:
        def chain(optimizer: SGD) -> LRScheduler:
            warmup = LinearLR(optimizer, 1e-12, 1.0, 5)  # torch does not start at 0
            return SequentialLR(optimizer, [warmup, after(optimizer)], [5])

        assert factors(schedule, make_state()) == pytest.approx(factors_of_torch(chain), abs=1e-7)


class TestFormulas:
    def test_a_warmup_rises_linearly_from_zero_and_ends_exactly_at_the_peak(self) -> None:
        found = factors(CosineAnnealingWithWarmupScheduler("3ba"), make_state())
        assert found[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-15)
        assert found[3] == 1.0

    def test_a_constant_with_warmup_stays_and_is_one_after_its_end(self) -> None:
        found = factors(ConstantWithWarmupScheduler("1ep", 0.5, "2ep"), make_state())
        assert found == pytest.approx([*(0.5 * i / 5 for i in range(5)), *[0.5] * 5, *[1.0] * 10])

    def test_a_linear_schedule_ends_at_its_last_factor_and_stays_there(self) -> None:
        found = factors(LinearWithWarmupScheduler("2ba", 0.8, 0.2, "2ep"), make_state())
        expected = [0, 0.4, *(0.8 - 0.6 * i / 8 for i in range(8)), *[0.2] * 10]
        assert found == pytest.approx(expected, abs=1e-12)

    def test_samples_are_counted_as_they_come(self) -> None:
        found = factors(LinearScheduler(1.0, 0.0, "36sp"), make_state(), 10)
        assert found == pytest.approx([1 - seen / 36 for seen in (0, 4, 8, 12, 16, 18, 22, 26, 30, 34)])

    @pytest.mark.parametrize("time", ["0ba", "0ep", "0dur"])
    def test_a_warmup_of_zero_has_no_effect(self, time: str) -> None:
        state = make_state()
        schedule = CosineAnnealingWithWarmupScheduler(time, alpha_f=0.1)
        schedule.check(state)
        assert factors(schedule, state) == pytest.approx(factors(CosineAnnealingScheduler(alpha_f=0.1), state))

    @pytest.mark.parametrize("max_duration", ["4ep", "20ba", "72sp"])
    def test_times_of_all_units_work_together(self, max_duration: str) -> None:
        state = make_state(max_duration)
        expected = [min(b / 5, 1) if b < 5 else (1 + math.cos(math.pi * (b - 5) / 10)) / 2 for b in range(15)]
        for t_warmup in ("1ep", "5ba", "18sp", "0.25dur"):
            for t_max in ("3ep", "15ba", "54sp", "0.75dur"):
                schedule = CosineAnnealingWithWarmupScheduler(t_warmup, t_max)
                schedule.check(state)
                if "sp" not in t_warmup + t_max and max_duration != "72sp":
                    assert factors(schedule, state, 15) == pytest.approx(expected, abs=1e-12)

    def test_it_is_a_pure_function_of_the_timestamp(self) -> None:
        for schedule in ALL:
            state = make_state()
            unbroken = factors(schedule, state)
            for batch in timestamps(state, 20):
                assert pickle.loads(pickle.dumps(schedule))(state) == unbroken[batch]

    def test_a_dataloader_without_a_length_leaves_batches_samples_and_fractions_of_them(self) -> None:
        state = make_state("20ba")
        expected = factors(CosineAnnealingWithWarmupScheduler("5ba"), state)
        state.train_dataloader = iter(())
        schedule = CosineAnnealingWithWarmupScheduler("0.25dur")
        schedule.check(state)
        assert [schedule(state) for _ in timestamps(state, 20)] == pytest.approx(expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: ConstantScheduler(-1.0), ValueError, "alpha must be a finite number >= 0, got -1.0"),
            (lambda: LinearScheduler(alpha_f=math.nan), ValueError, "alpha_f must be a finite number"),
            (lambda: LinearScheduler(alpha_i=True), TypeError, "alpha_i must be a finite number .* got True"),
            (lambda: MultiStepScheduler([]), ValueError, "milestones must be a list of times"),
            (lambda: MultiStepScheduler("30ep"), ValueError, "milestones must be a list of times"),
            (lambda: MultiStepScheduler(["0ep"]), ValueError, 'milestones must be positive, got "0ep"'),
            (lambda: MultiStepScheduler(["1ep"], gamma=-0.1), ValueError, "gamma must be a finite number"),
            (lambda: CosineAnnealingScheduler("0ba"), ValueError, 't_max must be positive, got "0ba"'),
            (lambda: CosineAnnealingScheduler("10min"), ValueError, 't_max must be in "ep", .* got "10min"'),
            (lambda: CosineAnnealingScheduler(5), TypeError, "t_max must be a Time or a time string"),
            (lambda: CosineAnnealingWithWarmupScheduler("-1ba"), ValueError, "t_warmup must be at least 0"),
            (lambda: CosineAnnealingWithWarmupScheduler("soon"), ValueError, "t_warmup: a time string must be like"),
        ],
    )
    def test_bad_arguments(self, make: Callable[[], Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize("time", ["5ep", "21ba", "73sp", "1.1dur"])
    @pytest.mark.parametrize("max_duration", ["4ep", "20ba", "72sp"])
    def test_a_schedule_longer_than_the_training(self, max_duration: str, time: str) -> None:
        state = make_state(max_duration)
        for schedule in (
            CosineAnnealingScheduler(time),
            MultiStepScheduler(["1ep", time]),
            ConstantWithWarmupScheduler("1ba", t_max=time),
            LinearWithWarmupScheduler(time),
        ):
            with pytest.raises(ValueError, match="must not be longer than the training, max_duration="):
                schedule.check(state)

    @pytest.mark.parametrize("time", ["4ep", "20ba", "72sp", "1dur"])
    @pytest.mark.parametrize("max_duration", ["4ep", "20ba", "72sp"])
    def test_a_schedule_as_long_as_the_training_is_not(self, max_duration: str, time: str) -> None:
        CosineAnnealingWithWarmupScheduler("3ba", time).check(make_state(max_duration))

    @pytest.mark.parametrize(
        "schedule",
        [
            CosineAnnealingWithWarmupScheduler("2ep", "10ba"),
            LinearWithWarmupScheduler("0.5dur", t_max="1ep"),
            ConstantWithWarmupScheduler("5ba", t_max="5ba"),
            MultiStepWithWarmupScheduler("5ba", ["2ep", "1ep"]),
        ],
    )
    def test_a_warmup_that_is_not_shorter(self, schedule: Any) -> None:
        with pytest.raises(ValueError, match=r"t_warmup of a .* must be shorter than its"):
            schedule.check(make_state())

    def test_times_that_cannot_be_compared(self) -> None:
        state = make_state("20ba")
        state.train_dataloader = iter(())
        with pytest.raises(ValueError, match="need a train_dataloader with a length"):
            CosineAnnealingWithWarmupScheduler("1ep").check(state)

    def test_a_training_without_a_duration(self) -> None:
        with pytest.raises(ValueError, match=r't_max="1\.0dur" needs a max_duration'):
            CosineAnnealingScheduler().check(make_state(None))


def test_a_schedule_depends_on_the_duration_where_a_time_is_a_fraction_of_it() -> None:
    assert CosineAnnealingScheduler().depends_on_duration
    assert MultiStepScheduler(["1ep", "0.5dur"]).depends_on_duration
    assert not CosineAnnealingWithWarmupScheduler("1ep", "3ep").depends_on_duration


def test_schedules_are_equal_by_their_settings() -> None:
    assert CosineAnnealingScheduler("3ep") == CosineAnnealingScheduler(Time.from_epoch(3))
    assert CosineAnnealingScheduler("3ep") != CosineAnnealingScheduler("4ep")
    assert MultiStepScheduler(["3ep"]) == MultiStepScheduler((Time.from_epoch(3),))
