"""Steps that are skipped because loss or gradients are not finite."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from etude import Trainer
from etude.engine import Algorithm, Event
from etude.trainer import CheckpointSaver
from helpers.networks import vectors
from helpers.resumable import differences, fit

NAN = float("nan")
NUM_STEPS = 12
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD with dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "fused SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, fused=True),
    "fused SGD without momentum": lambda p: SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: AdamW(p, lr=0.05),
    "fused AdamW": lambda p: AdamW(p, lr=0.05, fused=True),
    "fused Adam with amsgrad": lambda p: Adam(p, lr=0.05, amsgrad=True, fused=True),
    "fused Adagrad": lambda p: Adagrad(p, lr=0.05, fused=True),
}


class Branches(nn.Module):
    """BatchNorm, and a branch that is used in every second step only, beginning with the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head, self.branch = nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Linear(8, 8)
        self.step = -1

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        if self.training:
            self.step += 1
        x = self.norm(batch[0])
        return self.head(x + self.branch(x) if self.step % 2 else x)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class SpoilGradient(torch.autograd.Function):
    """The identity with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * NAN


class Spoil(Algorithm):
    """Makes the loss, or only the gradients, of some steps not finite."""

    find_unused_parameters = True  # type: ignore[assignment]

    def __init__(self, what: str, *steps: int) -> None:
        self.what, self.steps = what, steps

    def __repr__(self) -> str:
        return f"Spoil({self.what}, {self.steps})"

    def match(self, event: Event, state: Any) -> bool:
        event_of = {"loss": Event.AFTER_LOSS, "gradient": Event.AFTER_FORWARD}
        return event is event_of[self.what] and state.timestamp.batch in self.steps

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        if self.what == "loss":
            state.loss = state.loss * NAN
        else:
            state.outputs = SpoilGradient.apply(state.outputs)


def make_trainer(optimizer: str, *spoils: Algorithm, schedule: bool = True, **settings: Any) -> Trainer:
    model = Branches()
    made = OPTIMIZERS[optimizer](model.parameters())
    schedulers = OneCycleLR(made, max_lr=0.1, total_steps=NUM_STEPS + 1, cycle_momentum=False) if schedule else ()
    return Trainer(
        model,
        settings.pop("train_dataloader", vectors()),
        None,
        settings.pop("max_duration", f"{NUM_STEPS}ba"),
        algorithms=spoils,
        optimizers=made,
        schedulers=schedulers,
        step_schedulers_every_batch=schedule,
        device="cpu",
        progress_bar=False,
        **settings,
    )


def loop(optimizer: str, *bad_steps: int, schedule: bool = True) -> dict[str, Any]:
    """A training by hand in which bad batches are not applied, neither to the weights nor to the buffers."""
    model = Branches()
    made = OPTIMIZERS[optimizer](model.parameters())
    scheduler = OneCycleLR(made, max_lr=0.1, total_steps=NUM_STEPS + 1, cycle_momentum=False) if schedule else None
    for step, batch in enumerate([*vectors(), *vectors()]):
        made.zero_grad()
        if step in bad_steps:
            model.step += 1
            made.step()  # without gradients, for the scheduler, which would warn
        else:
            model.loss(model(batch), batch).backward()
            if "fused SGD" in optimizer:  # fails by itself where some parameters have their first step
                for group in made.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None and group["momentum"]:
                            made.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            made.step()
        if scheduler is not None:
            scheduler.step()
    return {"model": dict(model.state_dict()), "optimizer": made.state_dict()}


def outcome(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {"model": dict(state.model.state_dict()), "optimizer": state.optimizers[0].state_dict()}


def snapshot(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state
    return {
        "model": {name: tensor.clone() for name, tensor in state.model.state_dict().items()},
        "optimizers": torch.utils._pytree.tree_map(
            lambda x: x.clone() if isinstance(x, Tensor) else x, [o.state_dict() for o in state.optimizers]
        ),
        "schedulers": [dict(scheduler.state_dict()) for scheduler in state.schedulers],
        "timestamp": state.timestamp.state_dict(),
        "scaler": state.scaler.state_dict(),
    }


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad_steps", [(), (0,), (1,), (0, 1, 2), (3, 4, 7), (NUM_STEPS - 1,)], ids=str)
def test_skipped_steps_have_no_effect_on_the_run(what: str, optimizer: str, bad_steps: tuple[int, ...]) -> None:
    trainer = make_trainer(optimizer, Spoil(what, *bad_steps), max_nonfinite_steps=3)
    trainer.fit()
    assert differences(loop(optimizer, *bad_steps), outcome(trainer)) == []


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["SGD", "fused SGD", "AdamW", "fused AdamW"])
@pytest.mark.parametrize("bad_step", [0, 1, 5, NUM_STEPS - 1])
@pytest.mark.parametrize("schedule", [False, True])
def test_the_error_leaves_the_run_as_before_the_step(what: str, optimizer: str, bad_step: int, schedule: bool) -> None:
    kept: list[dict[str, Any]] = []

    class Keep(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_START

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            kept.append(snapshot(trainer))

    trainer = make_trainer(optimizer, Spoil(what, bad_step), Keep(), schedule=schedule)
    message = f"the loss of step {bad_step} is nan" if what == "loss" else f"the gradients of step {bad_step} are not"
    with pytest.raises(FloatingPointError, match=message):
        trainer.fit()
    found = snapshot(trainer)
    assert differences(kept[bad_step], found) == []
    assert len(kept) <= bad_step + 2, "the next step may begin, but is not applied"


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["SGD", "fused SGD", "fused AdamW"])
def test_a_resume_at_any_step_skips_the_same_steps(what: str, optimizer: str, tmp_path: Path) -> None:
    class Count(Algorithm):
        """The model's own count of steps, which is in no checkpoint."""

        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_START

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            state.model.step = int(state.timestamp.batch) - 1

    def counted(**settings: Any) -> Trainer:
        return make_trainer(optimizer, Spoil(what, 0, 3, 4, NUM_STEPS - 1), Count(), max_nonfinite_steps=2, **settings)

    expected = fit(counted(callbacks=CheckpointSaver(tmp_path, "1ba", num_to_keep=-1)))
    saved = sorted(tmp_path.glob("*.pt"))
    assert len(saved) == NUM_STEPS + 2, "with one at the end of each epoch"
    for path in saved:
        assert differences(expected, fit(counted(load_path=path))) == [], path.name


@pytest.mark.parametrize("optimizer", ["SGD", "fused SGD", "fused AdamW"])
def test_no_checkpoint_is_saved_of_a_step_that_is_an_error(optimizer: str, tmp_path: Path) -> None:
    trainer = make_trainer(optimizer, Spoil("gradient", 3), save_folder=tmp_path, save_interval="1ba")
    with pytest.raises(FloatingPointError, match="the gradients of step 3 are not finite, at a loss of"):
        trainer.fit()
    assert (tmp_path / "latest").read_text() == "ep0-ba3.pt\n"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    class Break(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_END and state.timestamp.batch == 3

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            with torch.no_grad():
                state.model.head.bias[1] = NAN

    trainer = make_trainer("SGD", Break(), save_folder=tmp_path, save_interval="1ba")
    with pytest.raises(FloatingPointError, match=r"the parameter 'head.bias' is not finite after step 3"):
        trainer.fit()
    assert (tmp_path / "latest").read_text() == "ep0-ba2.pt\n"


class Growing(nn.Module):
    """Keeps the rows of its latest batch in a buffer."""

    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 3)
        self.register_buffer("rows", torch.zeros(0, 8))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.rows = torch.cat([self.rows, batch[0]])[-10:]
        return self.linear(batch[0]) + self.rows.mean()

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("fused", [False, True])
def test_a_buffer_that_changes_its_shape_is_restored(fused: bool) -> None:
    def rows(*bad_steps: int) -> list[Tensor]:
        model, seen = Growing(), []

        class Keep(Algorithm):
            def match(self, event: Event, state: Any) -> bool:
                return event is Event.BATCH_START

            def apply(self, event: Event, state: Any, logger: Any) -> None:
                seen.append(model.rows.clone())

        Trainer(
            model,
            vectors(),
            None,
            "4ba",
            [Spoil("loss", *bad_steps), Keep()],
            SGD(model.parameters(), lr=0.1, fused=fused),
            device="cpu",
            progress_bar=False,
            max_nonfinite_steps=1,
        ).fit()
        return seen

    assert [len(seen) for seen in rows()] == [0, 4, 8, 10]
    assert [len(seen) for seen in rows(1)] == [0, 4, 4, 8]
    assert [len(seen) for seen in rows(0)] == [0, 0, 4, 8]


class Frozen(nn.Module):
    """Only the branch trains, which half of the steps skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.head.requires_grad_(False)
        self.step = -1

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.step += 1
        return self.head(self.branch(batch[0]) if self.step % 2 else batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


class Skips(Algorithm):
    """Says that parameters may be skipped."""

    find_unused_parameters = True  # type: ignore[assignment]

    def match(self, event: Event, state: Any) -> bool:
        return False

    def apply(self, event: Event, state: Any, logger: Any) -> None: ...


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp_fp16"])
def test_a_step_in_which_nothing_requires_a_gradient_counts(precision: Any, fused: bool) -> None:
    model = Frozen()
    optimizer = SGD(model.branch.parameters(), lr=0.1, momentum=0.9, fused=fused)
    before = model.branch.weight.detach().clone()
    trainer = Trainer(
        model, vectors(), None, "5ba", Skips(), optimizer, device="cpu", progress_bar=False, precision=precision
    )
    trainer.fit()
    assert trainer.state.timestamp.batch == 5
    assert not model.branch.weight.equal(before)


def test_a_loss_that_depends_on_no_parameter_is_an_error_where_nothing_is_skipped() -> None:
    model = Frozen()
    optimizer = SGD(model.branch.parameters(), lr=0.1)
    trainer = Trainer(model, vectors(), None, "5ba", (), optimizer, device="cpu", progress_bar=False)
    with pytest.raises(RuntimeError, match="the loss must depend on a parameter that requires a gradient"):
        trainer.fit()
