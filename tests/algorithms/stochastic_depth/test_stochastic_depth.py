"""The algorithm StochasticDepth in a Trainer: events, rates, logs, state."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import etude.functional as cf
from etude import Algorithm, Callback, Event, LoggerDestination, State, Time, Trainer
from etude.algorithms import StochasticDepth
from etude.algorithms.stochastic_depth.surgery import stochastic_blocks
from etude.models import ComposerClassifier, composer_resnet
from helpers.networks import images, tiny_resnet
from helpers.recording import At


class Recorder(LoggerDestination):
    """Keeps metrics, and at every batch the rates in force and the batch itself."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, Any]]] = []
        self.rates: list[list[float]] = []
        self.dropped: list[list[float]] = []
        self.inputs: list[torch.Tensor] = []
        self.eval_rates: list[list[float]] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def before_train_batch(self, state: State, logger: Any) -> None:
        self.inputs.append(state.batch[0].clone())
        blocks = stochastic_blocks(state.model)
        if blocks:
            self.rates.append([block.drop_rate for block in blocks])
            self.dropped.append(blocks[0].drop_plan.dropped_fractions())

    def eval_batch_start(self, state: State, logger: Any) -> None:
        self.eval_rates.append([block.drop_rate for block in stochastic_blocks(state.model)])


def train(algorithms: list[Algorithm], max_duration: str = "2ep", **arguments: Any) -> tuple[nn.Module, Recorder]:
    torch.manual_seed(0)
    model, recorder = tiny_resnet(), Recorder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dataloader = arguments.pop("train_dataloader", images(24, 4, shuffle=True))
    Trainer(
        model,
        dataloader,
        max_duration=max_duration,
        algorithms=algorithms,
        optimizers=optimizer,
        loggers=recorder,
        progress_bar=False,
        **arguments,
    ).fit()
    return model, recorder


@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_rate_of_zero_trains_bit_identically_to_no_algorithm(method: str) -> None:
    plain, plain_recorder = train([])
    zero, zero_recorder = train([StochasticDepth(stochastic_method=method, drop_rate=0.0)])
    for name, value in plain.state_dict().items():
        assert torch.equal(value, zero.state_dict()[name]), name
    losses = [
        [m["loss/train/total"] for _, m in r.metrics if "loss/train/total" in m]
        for r in (plain_recorder, zero_recorder)
    ]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    batch = next(iter(images()))
    assert torch.equal(plain.eval()(batch), zero.eval()(batch))


@pytest.mark.parametrize("method", ["block", "sample"])
def test_switching_the_algorithm_on_does_not_change_the_data_order(method: str) -> None:
    _, plain = train([])
    _, dropping = train([StochasticDepth(stochastic_method=method, drop_rate=0.9)])
    assert len(plain.inputs) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain.inputs, dropping.inputs, strict=True))
    assert not torch.equal(plain.inputs[0], plain.inputs[6])  # the order does change from epoch to epoch


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("max_duration", ["3ep", "18ba", "72sp"])
@pytest.mark.parametrize(("warmup", "end"), [("0.5dur", 9), ("2ep", 12), ("10ba", 10)])
def test_warmup_reaches_exactly_the_rate(method: str, max_duration: str, warmup: str, end: int) -> None:
    algorithm = StochasticDepth(stochastic_method=method, drop_rate=0.3, drop_warmup=warmup)
    _, recorder = train([algorithm], max_duration)
    last = [rates[-1] for rates in recorder.rates]
    assert len(last) == 18
    assert last[0] == 0
    assert last[:end] == pytest.approx([0.3 * batch / end for batch in range(end)])
    assert last[end:] == [0.3] * (18 - end)
    assert recorder.dropped[0] == [0.0] * 4


def test_the_data_order_does_not_depend_on_what_the_model_draws() -> None:
    """Dropped blocks draw less for their dropout, from the generator that shuffles."""

    def inputs(*algorithms: Algorithm) -> list[torch.Tensor]:
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3))
        data = TensorDataset(torch.arange(16.0)[:, None, None].expand(16, 4, 8), torch.zeros(16, dtype=torch.long))
        recorder = Recorder()
        Trainer(
            ComposerClassifier(network, 3),
            DataLoader(data, 4, shuffle=True),
            max_duration="3ep",
            algorithms=algorithms,
            loggers=recorder,
            progress_bar=False,
        ).fit()
        return recorder.inputs

    plain, dropping = inputs(), inputs(StochasticDepth(drop_rate=0.5))
    assert len(plain) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain, dropping, strict=True))


@pytest.mark.parametrize("eval_interval", ["1ep", "2ba"])
def test_evaluating_does_not_change_the_data_order(eval_interval: str) -> None:
    _, plain = train([])
    _, evaluated = train([], eval_dataloader=images(8, 4, shuffle=True), eval_interval=eval_interval)
    assert all(torch.equal(a, b) for a, b in zip(plain.inputs, evaluated.inputs, strict=True))


def test_after_an_exception_or_the_end_no_old_plan_is_used() -> None:
    class Stop(Callback):
        def after_forward(self, state: State, logger: Any) -> None:
            raise KeyboardInterrupt

    model = tiny_resnet()
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, images(), max_duration="1ep", algorithms=StochasticDepth(), callbacks=Stop()).fit()
    finished, _ = train([StochasticDepth()])
    for trained in (model, finished):
        with pytest.raises(RuntimeError, match="no drop plan was drawn for this forward in training"):
            trained.train()(next(iter(images())))


def test_an_algorithm_counts_from_zero_in_every_trainer() -> None:
    algorithm = StochasticDepth(drop_rate=0.4, drop_distribution="uniform")
    train([algorithm])
    train([algorithm])
    assert algorithm.expected_drop_rates == pytest.approx([0.4] * 4)


def test_evaluation_uses_the_rate_of_its_own_moment() -> None:
    algorithm = StochasticDepth(drop_rate=0.4, drop_distribution="uniform", drop_warmup="1.0dur")
    _, recorder = train([algorithm], "4ep", eval_dataloader=images(4, 4))
    assert [rates[0] for rates in recorder.eval_rates] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_one_plan_serves_all_microbatches_of_a_step() -> None:
    """So that the share of dropped blocks, and the memory, do not depend on the microbatch size."""
    drops = At(Event.BEFORE_FORWARD, lambda state: tuple(stochastic_blocks(state.model)[0].drop_plan.dropped_blocks))
    train(
        [StochasticDepth(drop_rate=0.5, drop_distribution="uniform")], device_train_microbatch_size=2, callbacks=drops
    )
    patterns = drops.answers
    assert len(patterns) == 24
    assert patterns[0::2] == patterns[1::2]
    assert len(set(patterns)) > 4


@pytest.mark.parametrize("method", ["block", "sample"])
def test_microbatches_train_like_the_whole_batch(method: str) -> None:
    """With BatchNorm in evaluation mode, which no microbatch can change."""

    class Freeze(Callback):
        def fit_start(self, state: State, logger: Any) -> None:
            for module in state.model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def weights(size: int | None) -> torch.Tensor:
        algorithm = StochasticDepth(stochastic_method=method, drop_rate=0.5, drop_distribution="uniform")
        model, _ = train([algorithm], device_train_microbatch_size=size, callbacks=Freeze())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = weights(None)
    assert torch.allclose(whole, weights(3), atol=1e-5)
    assert torch.allclose(whole, weights(1), atol=1e-5)


def test_the_plans_are_those_of_seed_and_step() -> None:
    _, first = train([StochasticDepth(drop_rate=0.5)], seed=5)
    _, second = train([StochasticDepth(drop_rate=0.5)], seed=5)
    _, other = train([StochasticDepth(drop_rate=0.5)], seed=6)
    assert any(map(any, first.dropped))
    assert first.dropped == second.dropped
    assert first.dropped != other.dropped


@pytest.mark.parametrize("method", ["block", "sample"])
def test_the_rate_and_the_blocks_that_were_dropped_are_logged(method: str) -> None:
    algorithm = StochasticDepth(stochastic_method=method, drop_rate=0.5, drop_warmup="6ba")
    _, recorder = train([algorithm])
    rows = [(step, m) for step, m in recorder.metrics if "stochastic_depth/drop_rate" in m]
    assert [step for step, _ in rows] == list(range(1, 13))
    for (_, row), rates, dropped in zip(rows, recorder.rates, recorder.dropped, strict=True):
        assert row["stochastic_depth/drop_rate"] == rates[-1]
        assert row["stochastic_depth/num_stochastic_layers"] == 4
        assert row["stochastic_depth/num_dropped_layers"] == pytest.approx(sum(dropped))
    assert algorithm.expected_drop_rates == pytest.approx(
        [sum(rates) / 12 for rates in zip(*recorder.rates, strict=True)]
    )
    assert algorithm.realized_drop_rates == pytest.approx(
        [sum(part) / 12 for part in zip(*recorder.dropped, strict=True)]
    )


def test_state_dict_carries_the_counts_on() -> None:
    algorithm = StochasticDepth(drop_rate=0.5)
    train([algorithm])
    other = StochasticDepth(drop_rate=0.5)
    Trainer(tiny_resnet(), algorithms=other, progress_bar=False)
    other.load_state_dict(copy.deepcopy(algorithm.state_dict()))
    other.load_rank_state_dict(copy.deepcopy(algorithm.rank_state_dict()))
    assert other.realized_drop_rates == algorithm.realized_drop_rates
    assert other.expected_drop_rates == algorithm.expected_drop_rates
    assert sum(other.realized_drop_rates) > 0


def test_it_may_leave_parameters_unused() -> None:
    assert StochasticDepth().find_unused_parameters


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnet152"])
def test_composer_code_with_a_loop_of_its_own_runs_unchanged(name: str) -> None:
    model = composer_resnet(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    cf.apply_stochastic_depth(
        model,
        target_layer_name="ResNetBottleneck",
        stochastic_method="block",
        drop_rate=0.2,
        drop_distribution="linear",
    )
    before = model.module.conv1.weight.detach().clone()
    model.train()
    for X, y in [(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))]:
        optimizer.zero_grad()
        y_hat = model([X, y])
        loss = F.cross_entropy(y_hat, y)
        loss.backward()
        optimizer.step()
    assert y_hat.shape == (2, 1000)
    assert not torch.equal(before, model.module.conv1.weight)


@pytest.mark.parametrize(("name", "num_blocks"), [("resnet50", 16), ("resnet101", 33), ("resnet152", 50)])
def test_composer_code_with_the_trainer_runs_unchanged(
    name: str, num_blocks: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = composer_resnet(name)
    data = TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(data, batch_size=2),
        eval_dataloader=DataLoader(data, batch_size=2),
        max_duration="1ep",
        algorithms=[
            StochasticDepth(
                target_layer_name="ResNetBottleneck",
                stochastic_method="block",
                drop_rate=0.2,
                drop_distribution="linear",
            )
        ],
    )
    trainer.fit()
    assert len(stochastic_blocks(model)) == num_blocks
    assert trainer.state.timestamp.epoch == 1
    assert "no optimizers were given: training with AdamW" in caplog.text


def test_two_of_them_on_one_model_are_refused_and_leave_it_alone() -> None:
    model = tiny_resnet()
    with pytest.raises(ValueError, match="a run must have at most one StochasticDepth"):
        Trainer(model, images(), max_duration="1ep", algorithms=[StochasticDepth(), StochasticDepth(drop_rate=0.1)])
    assert not stochastic_blocks(model)


def test_a_converted_model_is_refused() -> None:
    model = cf.apply_stochastic_depth(tiny_resnet())
    with pytest.raises(ValueError, match="model has stochastic depth already"):
        Trainer(model, images(), max_duration="1ep", algorithms=[StochasticDepth()])


def test_too_long_a_warmup_is_refused_before_the_surgery() -> None:
    model = tiny_resnet()
    with pytest.raises(ValueError, match='drop_warmup must not be longer than max_duration="1ep", got "2ep"'):
        Trainer(model, images(), max_duration="1ep", algorithms=[StochasticDepth(drop_warmup="2ep")])
    assert not stochastic_blocks(model)


def test_a_model_without_a_matching_block_is_refused() -> None:
    with pytest.raises(ValueError, match="model must contain residual blocks of a known type"):
        from helpers.networks import LinearModel, vectors

        Trainer(LinearModel(), vectors(), max_duration="1ep", algorithms=[StochasticDepth()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_layer_name": ""}, "target_layer_name must be the name of a block type or a module class, got ''"),
        ({"stochastic_method": "row"}, "stochastic_method must be 'block' or 'sample', got 'row'"),
        ({"drop_distribution": "log"}, "drop_distribution must be one of .* got 'log'"),
        ({"drop_rate": -0.2}, r"drop_rate must be a number in \[0, 1\], got -0.2"),
        ({"drop_warmup": -0.5}, "drop_warmup must not be negative, got -0.5dur"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StochasticDepth(**arguments)


def test_repr_names_every_setting() -> None:
    text = repr(StochasticDepth("ResNetBottleneck", "sample", 0.3, "uniform", Time(3, "ep"), False))
    assert all(part in text for part in ["ResNetBottleneck", "sample", "0.3", "uniform", "3", "False"])


def test_the_plan_before_init_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no drop plan before INIT"):
        _ = StochasticDepth().plan


def test_it_answers_only_the_events_it_needs() -> None:
    matched = {event for event in Event if StochasticDepth().match(event, None)}
    starts = {Event.INIT, Event.FIT_START, Event.BATCH_START, Event.BEFORE_FORWARD, Event.EVAL_START}
    assert matched == starts | {Event.BEFORE_BACKWARD, Event.BATCH_END, Event.FIT_END}
