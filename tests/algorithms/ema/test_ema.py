"""EMA: averages against torch's `AveragedModel`, evaluation, checkpoints."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import etude.functional as cf
from etude import Callback, Event, State, Trainer
from etude.algorithms import EMA, StochasticDepth
from etude.trainer import CheckpointSaver
from helpers.battery import make_model, make_trainer
from helpers.networks import images
from helpers.resumable import differences


def averages(ema: EMA) -> dict[str, Tensor]:
    return {**ema._parameters, **ema._buffers}


class Reference(Callback):
    """Averages with torch's own class after every `interval` batches from batch `start` on."""

    def __init__(self, smoothing: float, start: int = 1, interval: int = 1) -> None:
        self.smoothing, self.start, self.interval = smoothing, start, interval
        self.model: Any = None
        self.evaluated: list[dict[str, Tensor]] = []

    def batch_end(self, state: State, logger: Any) -> None:
        batch = int(state.timestamp.batch)
        if batch < self.start or batch % self.interval != 0:
            return
        if self.model is None:
            function = get_ema_multi_avg_fn(self.smoothing)
            self.model = AveragedModel(state.model, multi_avg_fn=function, use_buffers=True)
        self.model.update_parameters(state.model)

    def eval_start(self, state: State, logger: Any) -> None:
        self.evaluated.append({name: t.detach().clone() for name, t in state.model.state_dict().items()})

    def tensors(self) -> dict[str, Tensor]:
        both = [*self.model.module.named_parameters(), *self.model.module.named_buffers()]
        return {name: tensor.detach() for name, tensor in both if tensor.is_floating_point()}


@pytest.mark.parametrize(
    ("settings", "smoothing", "start", "interval"),
    [
        ({"half_life": "2ba"}, 2**-0.5, 1, 1),
        ({"half_life": None, "smoothing": 0.9}, 0.9, 1, 1),
        ({"half_life": "4ba", "update_interval": "2ba"}, 2**-0.5, 2, 2),
        ({"half_life": "2ba", "ema_start": "3ba"}, 2**-0.5, 3, 1),
        ({"half_life": "2ba", "ema_start": "0.5dur"}, 2**-0.5, 3, 1),
        ({"half_life": "2ba", "ema_start": "1ep"}, 2**-0.5, 3, 1),
        ({"half_life": "1ep"}, 0.5, 3, 3),
    ],
)
def test_it_equals_torchs_averaged_model(settings: Any, smoothing: float, start: int, interval: int) -> None:
    ema, reference = EMA(**settings), Reference(smoothing, start, interval)
    trainer = make_trainer(ema, callbacks=reference)
    trainer.fit()
    found, expected = averages(ema), reference.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert trainer.state.timestamp.batch == 6
    # The last evaluation sees the averages, and training ends with its own weights.
    for name, tensor in expected.items():
        torch.testing.assert_close(reference.evaluated[-1][name], tensor, rtol=1e-6, atol=1e-7)
    plain = make_trainer([])
    plain.fit()
    assert differences(dict(trainer.state.model.state_dict()), dict(plain.state.model.state_dict())) == []
    trainer.close()
    plain.close()


def test_an_evaluation_before_the_start_sees_the_weights() -> None:
    ema, reference = EMA("2ba", ema_start="4ba"), Reference(2**-0.5, start=4)
    trainer = make_trainer(ema, callbacks=reference)
    plain, watched = make_trainer([], callbacks=(other := Reference(0.5))), reference
    trainer.fit()
    plain.fit()
    assert differences(other.evaluated[0], watched.evaluated[0]) == []
    assert differences(other.evaluated[1], watched.evaluated[1]) != []
    trainer.close()
    plain.close()


def test_the_functional_form_is_the_formula_by_hand() -> None:
    model = make_model()
    ema_model = copy.deepcopy(model)
    before = {name: t.detach().clone() for name, t in ema_model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.fill_(7)
                module.running_mean.fill_(1.0)
    cf.compute_ema(model, ema_model, smoothing=0.75)
    new = dict(model.named_parameters())
    for name, parameter in ema_model.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * before[name] + 0.25 * new[name])
    norms = [module for module in ema_model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all((norm.running_mean == 0.25).all() and norm.num_batches_tracked == 7 for norm in norms)


def test_the_model_of_the_averages() -> None:
    ema = EMA("2ba")
    with pytest.raises(RuntimeError, match="none yet"):
        ema.get_ema_model(make_model())
    trainer = make_trainer(ema)
    trainer.fit()
    averaged = ema.get_ema_model(copy.deepcopy(trainer.state.model))
    assert differences(ema._parameters, {n: p.detach() for n, p in averaged.named_parameters()}) == []
    evaluation = Trainer(averaged, eval_dataloader=images(num_samples=4), device="cpu", progress_bar=False)
    assert evaluation.eval() == trainer.state.eval_metrics
    evaluation.close()
    with pytest.raises(ValueError, match="the model must have the parameters and buffers that EMA has averaged"):
        ema.get_ema_model(nn.Linear(2, 2))
    trainer.close()


class Fails(Callback):
    def eval_batch_end(self, state: State, logger: Any) -> None:
        if state.timestamp.batch == 6:
            raise RuntimeError("an evaluation that fails")


def test_a_failed_evaluation_does_not_leave_the_averages_in_the_training() -> None:
    ema = EMA("2ba")
    trainer = make_trainer(ema, callbacks=Fails())
    with pytest.raises(RuntimeError, match="an evaluation that fails"):
        trainer.fit()
    assert ema._is_active
    assert ema.state_dict()["is_active"]
    plain = make_trainer([])
    plain.fit()
    assert ema.match(Event.FIT_START, trainer.state)
    ema.apply(Event.FIT_START, trainer.state, trainer.logger)
    assert differences(dict(trainer.state.model.state_dict()), dict(plain.state.model.state_dict())) == []
    plain.close()


@pytest.mark.parametrize("order", [1, -1])
def test_it_evaluates_with_the_drop_rates_in_force(order: int, tmp_path: Path) -> None:
    """The best checkpoint is that of the averages, at the rate after the warmup."""
    rates: list[float] = []

    class Rates(Callback):
        def eval_batch_start(self, state: State, logger: Any) -> None:
            rates.append(max(getattr(module, "drop_rate", 0.0) for module in state.model.modules()))

    depth = StochasticDepth(drop_rate=0.5, drop_warmup="6ba")
    saver = CheckpointSaver(tmp_path, "1ba", best="min:loss/eval/total")
    trainer = make_trainer([depth, EMA("2ba")][::order], callbacks=[Rates(), saver])
    trainer.fit()
    assert rates == [0.25, 0.5]
    assert saver.state_dict()["best_value"] is not None
    trainer.close()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"half_life": None}, ValueError, "one of half_life and smoothing must be given"),
        ({"smoothing": 0.5}, ValueError, "one of half_life and smoothing must be given"),
        ({"half_life": None, "smoothing": 1.0}, ValueError, r"smoothing must be a number in \(0, 1\), got 1.0"),
        ({"half_life": None, "smoothing": "x"}, TypeError, r"smoothing must be a number in \(0, 1\), got 'x'"),
        ({"half_life": "0ba"}, ValueError, 'half_life must be positive and in batches or epochs, got "0ba"'),
        ({"half_life": "0.1dur"}, ValueError, 'half_life must be positive and in batches or epochs, got "0.1dur"'),
        ({"half_life": 3}, TypeError, "half_life must be a Time or a time string"),
        ({"update_interval": "1ep"}, ValueError, 'update_interval must be in the unit of half_life, got "1ep"'),
        ({"ema_start": "-1ba"}, ValueError, 'ema_start must not be negative.* got "-1ba"'),
        ({"ema_start": "1dur"}, ValueError, 'ema_start must not be negative.* got "1.0dur"'),
        ({"ema_start": "5min"}, ValueError, 'ema_start must not be negative.* got "5min"'),
    ],
)
def test_bad_settings_are_refused_at_once(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EMA(**settings)


def test_a_model_of_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="ema_model must have the parameters and buffers of model"):
        cf.compute_ema(nn.Linear(2, 2), nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"smoothing must be a number in \(0, 1\), got 0"):
        cf.compute_ema(nn.Linear(2, 2), nn.Linear(2, 2), 0)


@pytest.mark.parametrize("state", [{"averages": 3, "is_active": False}, {"averages": {}, "is_active": 1}])
def test_an_invalid_state_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="EMA must be"):
        EMA().load_state_dict(state)


def test_averages_begin_with_the_optimizers_first_step() -> None:
    ema = EMA("1000ba")
    trainer = make_trainer(ema, duration="1ba")
    trainer.fit()
    assert differences(ema._parameters, {n: p.detach() for n, p in trainer.state.model.named_parameters()}) == []
    trainer.close()
