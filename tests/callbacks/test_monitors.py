"""SpeedMonitor, MemoryMonitor and LRMonitor."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from etude import Algorithm, Callback, Event, Logger, LoggerDestination, State, Trainer
from etude.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor, speed_monitor, step_clock
from helpers.networks import LinearModel, vectors


class Rows(LoggerDestination):
    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def of(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows.values() if name in row]


class Pause(Callback):
    """Lets time pass at the events where the model would work."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def before_forward(self, state: State, logger: Logger) -> None:
        self.clock[0] += 0.5

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        self.clock[0] += 10.0


class Parts(Algorithm):
    """Lets time pass in each part of a step."""

    def __init__(self, clock: list[float], *, data: list[float], backward: float, optimizer: float) -> None:
        self._clock, self._data, self._backward, self._optimizer = clock, data, backward, optimizer

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.AFTER_DATALOADER, Event.AFTER_BACKWARD, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.AFTER_DATALOADER:
            self._clock[0] += self._data[int(state.timestamp.batch)]
        else:
            self._clock[0] += self._backward if event is Event.AFTER_BACKWARD else self._optimizer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    for module in (speed_monitor, step_clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    yield now


def fit(*callbacks: Callback | Algorithm, max_duration: str = "2ep", **settings: Any) -> Rows:
    rows = Rows()
    model = settings.pop("model", None) or LinearModel()
    algorithms = [one for one in callbacks if isinstance(one, Algorithm)]
    others = [one for one in callbacks if isinstance(one, Callback)]
    settings |= {"algorithms": algorithms, "callbacks": others, "loggers": rows, "progress_bar": False}
    trainer = Trainer(model, vectors(), vectors(8), max_duration, **settings)
    trainer.fit()
    trainer.close()
    return rows


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == speed_monitor.__name__]


class TestLRMonitor:
    def test_all_groups_of_all_optimizers_are_logged_as_used_in_the_step(self) -> None:
        model = LinearModel()
        weight, bias = model.parameters()
        sgd = SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2}])
        rows = fit(
            LRMonitor(),
            model=model,
            optimizers=[sgd, Adam([weight], lr=0.3), SGD([bias], lr=0.4)],
            schedulers=ExponentialLR(sgd, 0.5),
            step_schedulers_every_batch=True,
            max_duration="3ba",
        )
        assert rows.of("lr-SGD/group0") == pytest.approx([0.1, 0.05, 0.025])
        assert rows.of("lr-SGD/group1") == pytest.approx([0.2, 0.1, 0.05])
        assert rows.of("lr-Adam/group0") == [0.3] * 3
        assert rows.of("lr-SGD1/group0") == [0.4] * 3

    def test_a_learning_rate_that_is_a_tensor_is_logged_as_it_was(self) -> None:
        model = LinearModel()
        optimizer = SGD(model.parameters(), lr=torch.tensor(0.1))
        rows = fit(
            LRMonitor(),
            model=model,
            optimizers=optimizer,
            schedulers=ExponentialLR(optimizer, 0.5),
            step_schedulers_every_batch=True,
            max_duration="3ba",
        )
        assert rows.of("lr-SGD/group0") == pytest.approx([0.1, 0.05, 0.025])
        assert isinstance(rows.rows[1]["lr-SGD/group0"], Tensor)


class TestSpeedMonitor:
    def test_throughput_and_elapsed_time(self, clock: list[float]) -> None:
        """A step of 4 samples takes 0.5 s, an evaluation of 2 batches 20 s."""
        rows = fit(SpeedMonitor(time_unit="seconds"), Pause(clock))
        assert rows.of("throughput/batches_per_sec") == pytest.approx([2.0] * 12)
        assert rows.of("throughput/samples_per_sec") == pytest.approx([8.0] * 12)
        assert rows.of("throughput/device/samples_per_sec") == pytest.approx([8.0] * 12)
        assert rows.of("time/train") == pytest.approx([0.5 * step for step in range(1, 13)])
        assert rows.of("time/val") == pytest.approx([0.0] * 6 + [20.0] * 6)
        assert rows.of("time/total") == pytest.approx([0.5 * step + 20.0 * (step > 6) for step in range(1, 13)])

    def test_the_mean_is_that_of_the_latest_steps(self, clock: list[float]) -> None:
        class Slower(Callback):
            def before_forward(self, state: State, logger: Logger) -> None:
                clock[0] += state.timestamp.batch + 1

        rows = fit(SpeedMonitor(window_size=2), Slower(), max_duration="4ba")
        assert rows.of("throughput/batches_per_sec") == pytest.approx([1 / 1, 2 / 3, 2 / 5, 2 / 7])

    @pytest.mark.parametrize(("unit", "seconds"), [("minutes", 60), ("hours", 3600), ("days", 86400)])
    def test_units_of_time(self, clock: list[float], unit: Any, seconds: int) -> None:
        rows = fit(SpeedMonitor(time_unit=unit), Pause(clock), max_duration="1ba")
        assert rows.of("time/train") == pytest.approx([0.5 / seconds])

    def test_elapsed_times_continue_in_a_resumed_run(self, clock: list[float], tmp_path: Path) -> None:
        settings: dict[str, Any] = {"save_folder": tmp_path, "optimizers": None}

        def run(max_duration: str, **more: Any) -> Rows:
            model = LinearModel()
            settings["optimizers"] = SGD(model.parameters(), lr=0.1)
            monitor = SpeedMonitor(time_unit="seconds")
            return fit(monitor, Pause(clock), model=model, max_duration=max_duration, **settings, **more)

        run("7ba")
        clock[0] += 1000.0
        rows = run("2ep", autoresume=True)
        assert rows.of("time/train") == pytest.approx([4.0, 4.5, 5.0, 5.5, 6.0])
        assert rows.of("throughput/batches_per_sec") == pytest.approx([2.0] * 5)
        assert rows.of("time/val")[0] == pytest.approx(40.0)

    def test_the_parts_of_a_step_are_means_over_the_latest_steps(self, clock: list[float]) -> None:
        rows = fit(
            SpeedMonitor(window_size=2), Parts(clock, data=[9, 1, 2, 4], backward=3, optimizer=1), max_duration="4ba"
        )
        assert rows.of("step_time/data") == pytest.approx([1, 1.5, 3])
        assert rows.of("step_time/forward_backward") == pytest.approx([3] * 3)
        assert rows.of("step_time/optimizer") == pytest.approx([1] * 3)
        assert rows.of("step_time/data_share") == pytest.approx([1 / 5, 1.5 / 5.5, 3 / 7])
        assert min(step for step, row in rows.rows.items() if "step_time/data" in row) == 2

    def test_evaluations_are_no_part_of_a_step(self, clock: list[float]) -> None:
        rows = fit(SpeedMonitor(), Pause(clock))
        assert rows.of("step_time/forward_backward") == pytest.approx([0.5] * 11)
        assert rows.of("step_time/data_share") == [0.0] * 11

    def test_a_slow_loader_is_warned_of_once(self, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
        monitor = SpeedMonitor(window_size=3)
        fit(monitor, Parts(clock, data=[1] * 12, backward=2, optimizer=1))
        (warning,) = _warnings(caplog)
        assert warning == (
            "the latest 3 steps waited for data for 25% of their time, 1 of 4 s per step: training could be 1.3 "
            "times as fast. Set more num_workers in train_dataloader (now 0), or make its samples cheaper to load"
        )
        assert monitor.data_share == pytest.approx(0.25)

    @pytest.mark.parametrize("settings", [{}, {"max_data_share": 1, "data": 100}])
    def test_a_fast_loader_is_not_warned_of(
        self, clock: list[float], settings: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = settings.pop("data", 0.5)
        fit(SpeedMonitor(window_size=3, **settings), Parts(clock, data=[seconds] * 12, backward=2, optimizer=1))
        assert not _warnings(caplog)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_the_parts_are_measured_by_its_own_clock(self) -> None:
        rows = fit(SpeedMonitor(), device="gpu")
        assert rows.of("step_time/forward_backward")[-1] > 0
        assert 0 <= rows.of("step_time/data_share")[-1] <= 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_data_share": 1.5}, r"max_data_share must be a number in .*, got 1\.5"),
            ({"window_size": 0}, "window_size must be an int >= 1, got 0"),
            ({"window_size": True}, "window_size must be an int >= 1, got True"),
            ({"time_unit": "weeks"}, "time_unit must be one of seconds, minutes, hours, days, got 'weeks'"),
        ],
    )
    def test_bad_arguments_are_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            SpeedMonitor(**settings)


class TestMemoryMonitor:
    def test_on_a_cpu_the_peak_of_the_process_is_logged(self) -> None:
        peaks = fit(MemoryMonitor(), device="cpu", max_duration="3ba").of("memory/peak_resident_mem")
        assert len(peaks) == 3
        assert peaks == sorted(peaks)
        assert 0.05 < peaks[0] < 1000  # gigabytes of a process that has imported torch

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_the_statistics_of_the_allocator_are_logged(self) -> None:
        rows = fit(MemoryMonitor(), device="gpu", max_duration="3ba")
        for name in ("current_allocated_mem", "peak_allocated_mem", "peak_reserved_mem", "alloc_retries"):
            assert all(math.isfinite(value) and value >= 0 for value in rows.of(f"memory/{name}"))
        assert rows.of("memory/peak_allocated_mem")[-1] >= rows.of("memory/current_allocated_mem")[-1] > 0

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_an_unknown_statistic_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"memory_keys must be statistics of .* got 'bytes'"):
            fit(MemoryMonitor({"bytes": "mem"}), device="gpu")
