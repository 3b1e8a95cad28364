"""The pseudocode in the docstring of `Event` matches the events of a Trainer."""

import inspect
import itertools
import re
import textwrap
from types import SimpleNamespace

import pytest
import torch

from etude.engine import Callback, Event
from etude.trainer import Trainer
from helpers.networks import LinearModel, vectors

TEXT = inspect.cleandoc(Event.__doc__)
BLOCKS = [textwrap.dedent(block) for block in re.findall(r"code-block:: python\n\n((?:    .*\n|\n)+)", TEXT)]


def run_block(block: str, log: list[str], **names) -> None:
    """Execute a code block whose event markers became calls that append to `log`."""
    code, count = re.subn(r"# <(\w+)>.*", r'happens("\1")', block)
    assert count > 0
    exec(code, {"happens": log.append, **names})


def feed(num_batches: int):
    """A function that returns batches, then None, then batches again."""
    source = itertools.cycle([*["batch"] * num_batches, None])
    return lambda: next(source)


class StubModel:
    """Stands for the model of the text; notes what is done with it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __call__(self, batch):
        self.log.append("forward")

    def loss(self, outputs, batch):
        self.log.append("loss")
        return SimpleNamespace(backward=lambda: self.log.append("backward"))


def told_by_the_text(interval: str, resuming: bool = False) -> list[str]:
    """2 epochs of 2 batches of 2 microbatches, and evaluations of 3 batches."""
    log: list[str] = []
    model = StubModel(log)
    evaluation = {"model": model, "next_batch": feed(3), "evaluators": range(1), "standalone": False}
    run_block(
        BLOCKS[0],
        log,
        there_is_a_checkpoint=resuming,
        load_checkpoint=lambda: log.append("load"),
        epochs=range(2),
        next_batch=feed(2),
        split=lambda batch: [batch, batch],
        model=model,
        optimizer=SimpleNamespace(step=lambda: log.append("step")),
        evaluation_is_due=lambda moment: isinstance(moment, int) == (interval == "1ep"),
        evaluate=lambda: run_block(BLOCKS[1], log, **evaluation),
    )
    return log


class NotingModel(LinearModel):
    """A real model that notes what is done with it in training, and its forward in evaluation."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def forward(self, batch):
        self.log.append("forward")
        return super().forward(batch)

    def loss(self, outputs, batch):
        loss = super().loss(outputs, batch)
        if self.training:
            self.log.append("loss")
            loss.register_hook(lambda gradient: self.log.append("backward"))
        return loss


def listener(log: list[str]) -> Callback:
    """A callback that notes every event."""

    def noting(event: Event):
        return lambda self, state, logger: log.append(event.name)

    return type("Listener", (Callback,), {event.value: noting(event) for event in Event})()


def build_trainer(log: list[str], **arguments) -> Trainer:
    model = NotingModel(log)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: log.append("step"))
    return Trainer(
        model,
        vectors(8, 4),
        vectors(12, 4),
        "2ep",
        optimizers=optimizer,
        callbacks=listener(log),
        device_train_microbatch_size=2,
        device="cpu",
        progress_bar=False,
        **arguments,
    )


@pytest.mark.parametrize("interval", ["1ep", "1ba"])
def test_fit_does_exactly_what_the_text_says(interval):
    done: list[str] = []
    build_trainer(done, eval_interval=interval).fit()
    told = told_by_the_text(interval)
    assert {"forward", "loss", "backward", "step", "FIT_END", "EVAL_END"} <= set(told)
    assert done == told


def test_a_checkpoint_is_loaded_after_init_and_before_fit_start() -> None:
    fresh, resumed = told_by_the_text("1ep"), told_by_the_text("1ep", resuming=True)
    assert fresh[:4] == ["INIT", "BEFORE_LOAD", "AFTER_LOAD", "FIT_START"]
    assert resumed == ["INIT", "BEFORE_LOAD", "load", "AFTER_LOAD", *fresh[3:]]


def test_standalone_evaluation_does_exactly_what_the_text_says():
    done: list[str] = []
    trainer = build_trainer(done)
    done.clear()
    trainer.eval()
    told: list[str] = []
    run_block(BLOCKS[1], told, model=StubModel(told), next_batch=feed(3), evaluators=range(1), standalone=True)
    assert told[0] == "EVAL_STANDALONE_START"
    assert told[-1] == "EVAL_STANDALONE_END"
    assert done == told


def test_several_sets_of_data_are_evaluated_as_the_text_says() -> None:
    done: list[str] = []
    model = NotingModel(done)
    data = {"a": vectors(12, 4), "b": vectors(12, 4)}
    trainer = Trainer(model, eval_dataloader=data, callbacks=listener(done), device="cpu", progress_bar=False)
    done.clear()
    trainer.eval()
    told: list[str] = []
    run_block(BLOCKS[1], told, model=StubModel(told), next_batch=feed(3), evaluators=range(2), standalone=True)
    assert done == told


def test_prediction_does_exactly_what_the_text_says() -> None:
    done: list[str] = []
    trainer = build_trainer(done)
    done.clear()
    trainer.predict(vectors(12, 4))
    told: list[str] = []
    run_block(BLOCKS[2], told, model=StubModel(told), dataloader=range(3))
    assert done == told


def test_the_text_shows_every_event_exactly_once():
    markers = re.findall(r"# <(\w+)>", "".join(BLOCKS))
    assert len(BLOCKS) == 3
    assert sorted(markers) == sorted(event.name for event in Event)


@pytest.mark.parametrize("event", Event)
def test_every_event_has_a_callback_method_of_its_value(event):
    assert event.value == event.name.lower()
    assert callable(vars(Callback)[event.value])
