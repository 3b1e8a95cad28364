"""What algorithms, callbacks and schedules keep is after a step that is not finite as it was before."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from etude import Algorithm, Callback, Event, Trainer
from etude.algorithms import EMA, GradientClipping, StochasticDepth
from etude.callbacks import SpeedMonitor
from etude.optim import LinearScheduler
from etude.trainer import CheckpointSaver
from helpers.networks import images, tiny_resnet
from helpers.ranks import on_ranks
from helpers.resumable import differences

NUM_STEPS = 8


class Spoil(Algorithm):
    """Makes the loss of some steps infinite, on the last rank."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def match(self, event: Event, state: Any) -> bool:
        is_last = state.rank == state.world_size - 1
        return event is Event.AFTER_LOSS and state.timestamp.batch in self._steps and is_last

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        state.loss = state.loss * float("inf")


class CountsEvents(Algorithm):
    """Counts events of the step, and sums losses in a tensor that is changed in place."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._sum = torch.zeros(())

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.AFTER_DATALOADER, Event.BATCH_START, Event.AFTER_LOSS, Event.BATCH_END)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self._counts[event.value] = self._counts.get(event.value, 0) + 1
        if event is Event.AFTER_LOSS:
            self._sum += state.loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts} if self._counts else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = dict(state.get("counts", {}))

    def rank_state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self._sum = state["sum"]


class CountsBatches(Callback):
    def __init__(self) -> None:
        self._count = 0

    def batch_end(self, state: Any, logger: Any) -> None:
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count = state["count"]


def saved(state: Any) -> dict[str, Any]:
    """What a checkpoint has of the run, copied."""
    copied = torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, Tensor) else value,
        {
            "model": dict(state.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
            "algorithms": [(algorithm.state_dict(), algorithm.rank_state_dict()) for algorithm in state.algorithms],
            "callbacks": [callback.state_dict() for callback in state.callbacks],
            "progress": state.state_dict(),
            "scaler": state.scaler.state_dict(),
        },
    )
    assert isinstance(copied, dict)
    return copied


class Keep(Callback):
    """Keeps what a checkpoint would have before each step."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Any]] = []

    @property
    def kept(self) -> list[dict[str, Any]]:
        return self._kept

    def fit_start(self, state: Any, logger: Any) -> None:
        self._kept.append(saved(state))

    def batch_checkpoint(self, state: Any, logger: Any) -> None:
        flag = state.found_nonfinite
        if not flag.item():  # read without telling the Trainer
            self._kept.append(saved(state))


def make_trainer(fused: bool, *bad_steps: int, keep: Keep | None = None, **settings: Any) -> tuple[Trainer, EMA]:
    torch.manual_seed(0)
    model, ema = tiny_resnet(), EMA("2ba")
    settings = {"max_duration": f"{NUM_STEPS}ba", "device": "cpu", "progress_bar": False, **settings}
    callbacks = [CountsBatches(), SpeedMonitor(), *([] if keep is None else [keep]), *settings.pop("callbacks", [])]
    trainer = Trainer(
        model,
        images(num_samples=32),
        algorithms=[
            Spoil(*bad_steps),
            StochasticDepth(drop_rate=0.5),
            ema,
            CountsEvents(),
            GradientClipping("norm", 1),
        ],
        optimizers=SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused),
        schedulers=LinearScheduler(alpha_f=0.1),
        callbacks=callbacks,
        eval_interval=0,
        **settings,
    )
    return trainer, ema


def check_undone(fused: bool, bad_step: int, precision: Any = "fp32") -> None:
    keep = Keep()
    trainer, _ = make_trainer(fused, bad_step, keep=keep, precision=precision)
    with pytest.raises(FloatingPointError, match=f"the loss of step {bad_step} is inf"):
        trainer.fit()
    assert len(keep.kept) == bad_step + 1
    found = saved(trainer.state)
    for kept in (keep.kept[bad_step], found):
        del kept["callbacks"][1]  # seconds of SpeedMonitor
    assert differences(keep.kept[bad_step], found) == []


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_step", [0, 1, 4, NUM_STEPS - 1])
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_all_that_is_saved_is_as_before_the_step(fused: bool, bad_step: int, precision: Any) -> None:
    check_undone(fused, bad_step, precision)


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_step", [0, 1, 4, NUM_STEPS - 1])
def test_all_that_is_saved_is_as_before_the_step_on_two_ranks(fused: bool, bad_step: int) -> None:
    check_undone(fused, bad_step)


class Reference(Algorithm):
    """The averages by hand, without those steps that are skipped."""

    def __init__(self, *bad_steps: int) -> None:
        self._bad_steps = bad_steps
        self._averages: dict[str, Tensor] = {}

    @property
    def averages(self) -> dict[str, Tensor]:
        return self._averages

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.BATCH_END and int(state.timestamp.batch) - 1 not in self._bad_steps

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        for name, tensor in state.model.state_dict().items():
            if tensor.is_floating_point():
                average = self._averages.get(name, tensor)
                self._averages[name] = average + (1 - 2**-0.5) * (tensor - average)


def check_averages(fused: bool, bad_steps: tuple[int, ...]) -> None:
    trainer, ema = make_trainer(fused, *bad_steps, max_nonfinite_steps=3)
    reference = Reference(*bad_steps)
    trainer.state.algorithms = (reference, *trainer.state.algorithms)
    trainer.fit()
    found = {**ema.state_dict()["averages"], **ema.rank_state_dict()["averages"]}
    assert found.keys() == reference.averages.keys()
    for name, average in reference.averages.items():
        torch.testing.assert_close(found[name], average, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_steps", [(), (0,), (0, 1, 2), (3, 4), (NUM_STEPS - 1,)], ids=str)
def test_skipped_steps_do_not_move_the_averages(fused: bool, bad_steps: tuple[int, ...]) -> None:
    check_averages(fused, bad_steps)


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_steps", [(0,), (3, 4), (NUM_STEPS - 1,)], ids=str)
def test_skipped_steps_do_not_move_the_averages_on_two_ranks(fused: bool, bad_steps: tuple[int, ...]) -> None:
    check_averages(fused, bad_steps)


def check_resume(fused: bool, bad_steps: tuple[int, ...], folder: Path, precision: Any = "fp32") -> None:
    saver = CheckpointSaver(folder, "1ba", num_to_keep=-1)
    settings: dict[str, Any] = {"max_nonfinite_steps": 3, "precision": precision}
    whole, _ = make_trainer(fused, *bad_steps, callbacks=[saver], **settings)
    whole.fit()
    expected = saved(whole.state)
    for step in {bad_steps[0] + 1, bad_steps[-1] + 1}:
        resumed, _ = make_trainer(fused, *bad_steps, load_path=folder / f"ep0-ba{step}.pt", **settings)
        resumed.fit()
        found = saved(resumed.state)
        if resumed.state.world_size > 1:  # ranks resume with the running statistics of rank 0
            for results in (expected, found):
                results["model"] = {name: t for name, t in results["model"].items() if "running" not in name}
                results["algorithms"][2][1]["averages"] = {}
        assert differences(_without_callbacks(expected), _without_callbacks(found)) == [], step


def _without_callbacks(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "callbacks"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_steps", [(0,), (0, 1, 2), (3, 4), (NUM_STEPS - 1,)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_a_resume_after_skipped_steps_is_exact(
    fused: bool, bad_steps: tuple[int, ...], precision: Any, tmp_path: Path
) -> None:
    check_resume(fused, bad_steps, tmp_path, precision)


@on_ranks(2)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad_steps", [(0,), (3, 4), (NUM_STEPS - 1,)], ids=str)
def test_a_resume_after_skipped_steps_is_exact_on_two_ranks(
    fused: bool, bad_steps: tuple[int, ...], tmp_path: Path
) -> None:
    check_resume(fused, bad_steps, tmp_path)
