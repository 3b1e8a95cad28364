"""GradientClipping: clipped gradients against the formulas, on one rank, two ranks and with FSDP."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

import etude.functional as cf
from etude import Algorithm, Event
from etude.algorithms import GradientClipping
from helpers.battery import make_model, make_trainer
from helpers.ranks import on_ranks


def network() -> nn.Module:
    """Weights of 1 to 4 dimensions, a scalar, a zero and one without a gradient, with random gradients."""
    generator = torch.Generator().manual_seed(1)
    model = nn.Module()
    for number, shape in enumerate([(), (5,), (4, 3), (2, 3, 4), (3, 2, 3, 3)]):
        parameter = Parameter(torch.randn(shape, generator=generator))
        parameter.grad = torch.randn(shape, generator=generator)
        model.register_parameter(f"p{number}", parameter)
    model.zero = Parameter(torch.zeros(3))
    model.zero.grad = torch.ones(3)
    model.unused = Parameter(torch.ones(3))
    return model


def gradients(model: nn.Module) -> dict[str, np.ndarray[Any, Any]]:
    return {name: p.grad.double().numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def clipped(kind: str, threshold: float) -> tuple[dict[str, Any], dict[str, Any], nn.Module]:
    model = network()
    before = gradients(model)
    cf.apply_gradient_clipping(model, kind, threshold)
    assert model.unused.grad is None
    return before, gradients(model), model


@pytest.mark.parametrize("threshold", [0.1, 1.0, 100.0])
def test_norm_scales_all_gradients_together(threshold: float) -> None:
    before, after, _ = clipped("norm", threshold)
    norm = np.sqrt(sum((gradient**2).sum() for gradient in before.values()))
    for name, gradient in before.items():
        np.testing.assert_allclose(after[name], gradient * min(1.0, threshold / norm), rtol=1e-5)


@pytest.mark.parametrize("threshold", [0.1, 1.0, 100.0])
def test_value_clamps_each_element(threshold: float) -> None:
    before, after, _ = clipped("value", threshold)
    for name, gradient in before.items():
        np.testing.assert_allclose(after[name], np.clip(gradient, -threshold, threshold), rtol=1e-6)


@pytest.mark.parametrize("threshold", [0.01, 1.0, 100.0])
def test_adaptive_bounds_each_unit_by_its_parameters(threshold: float) -> None:
    before, after, model = clipped("adaptive", threshold)
    for name, gradient in before.items():
        weights = dict(model.named_parameters())[name].detach().double().numpy()
        expected = gradient.copy()
        units = [...] if weights.ndim < 2 else range(len(weights))
        for unit in units:
            largest = threshold * max(1e-3, np.linalg.norm(weights[unit].ravel()))
            norm = np.linalg.norm(gradient[unit].ravel())
            expected[unit] *= min(1.0, largest / norm)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5)
    assert (after["zero"] > 0).all()


def test_a_gradient_of_zero_stays_zero() -> None:
    for kind in ("norm", "value", "adaptive"):
        model = nn.Linear(2, 2)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        cf.apply_gradient_clipping(model, kind, 0.1)
        assert all((parameter.grad == 0).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("norms", 1.0), ValueError, "clipping_type must be 'adaptive', 'norm' or 'value', got 'norms'"),
        (("norm", 0.0), ValueError, "clipping_threshold must be a finite number > 0, got 0.0"),
        (("norm", -1), ValueError, "clipping_threshold must be a finite number > 0, got -1"),
        (("norm", float("nan")), ValueError, "clipping_threshold must be a finite number > 0, got nan"),
        (("norm", float("inf")), ValueError, "clipping_threshold must be a finite number > 0, got inf"),
        (("norm", True), TypeError, "clipping_threshold must be a finite number > 0, got True"),
        (("norm", "1"), TypeError, "clipping_threshold must be a finite number > 0, got '1'"),
    ],
)
def test_bad_settings_are_refused_at_once(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientClipping(*arguments)
    with pytest.raises(error, match=message):
        cf.apply_gradient_clipping(nn.Linear(2, 2), *arguments)


class NormOfGradients(Algorithm):
    """Keeps the norm of the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self._norms: list[float] = []

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        found = [p.grad for p in state.model.parameters() if p.grad is not None]
        norms = [float(g.full_tensor().norm() if hasattr(g, "full_tensor") else g.norm()) for g in found]
        self._norms.append(float(np.linalg.norm(norms)))


@pytest.mark.parametrize("size", [4, 1])
def test_the_gradient_of_the_whole_batch_is_clipped(size: int) -> None:
    """AFTER_TRAIN_BATCH is reversed: what stands before clipping in the list sees what it has left."""
    watch = NormOfGradients()
    trainer = make_trainer([watch, GradientClipping("norm", 0.01)], device_train_microbatch_size=size)
    trainer.fit()
    trainer.close()
    assert watch._norms == pytest.approx([0.01] * 6, rel=1e-3)


@pytest.mark.slow
@on_ranks(2)
@pytest.mark.parametrize(("kind", "threshold"), [("norm", 0.05), ("value", 0.01), ("adaptive", 0.01)])
def test_sharded_gradients_are_clipped_like_whole_ones(kind: str, threshold: float) -> None:
    weights: list[dict[str, Tensor]] = []
    for parallelism in ("ddp", "fsdp"):
        trainer = make_trainer(
            GradientClipping(kind, threshold), make_model(frozen_batchnorm=True), parallelism=parallelism
        )
        trainer.fit()
        named = trainer.state.model.named_parameters()
        weights.append({name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in named})
        trainer.close()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)
