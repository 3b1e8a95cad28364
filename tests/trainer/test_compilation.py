"""torch.compile: changed rates and drop plans do not recompile."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from etude import Algorithm, Event, State, Trainer
from etude.algorithms import ActivationCheckpointing, LabelSmoothing, StochasticDepth
from etude.models import ComposerClassifier
from helpers.networks import LinearModel, images, tiny_resnet, vectors
from helpers.ranks import on_ranks

# The compiler looks at the gradients of its inputs, and torch warns if they are no parameters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]


@pytest.fixture(autouse=True)
def new_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class CountCompilations(Algorithm):
    """Notes at the end of each batch how many graphs there are."""

    def __init__(self) -> None:
        self.backend = CompileCounter()
        self._counts: list[int] = []

    @property
    def counts(self) -> list[int]:
        return self._counts

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Any) -> None:
        self._counts.append(self.backend.frame_count)


def train(model: Any, algorithms: Any, num_batches: int, **settings: Any) -> dict[str, Any]:
    data = images(num_samples=4 * num_batches, size=settings.pop("size", 8))
    trainer = Trainer(model, data, None, "1ep", algorithms, device="cpu", progress_bar=False, **settings)
    trainer.fit()
    trainer.close()
    return dict(model.state_dict())


def check_compiled_once(network: Any, method: Any, num_batches: int, *, settled: int, size: int = 8) -> None:
    """Not one graph is added after `settled` steps, and the weights are those of the same training without compile."""
    count = CountCompilations()
    model = ComposerClassifier(network, 3)
    plain = copy.deepcopy(model)

    def depth() -> StochasticDepth:
        return StochasticDepth(stochastic_method=method, drop_rate=0.5, drop_warmup=f"{num_batches}ba")

    compiled = train(model, [depth(), count], num_batches, size=size, compile_config={"backend": count.backend})
    eager = train(plain, [depth()], num_batches, size=size)
    assert count.counts[0] > 0
    assert set(count.counts[settled:]) == {count.counts[-1]}, count.counts
    for name, tensor in eager.items():
        assert torch.allclose(tensor, compiled[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("method", ["block", "sample"])
def test_a_small_network_is_compiled_once(method: str) -> None:
    check_compiled_once(tiny_resnet(num_blocks=3).module, method, 20, settled=15)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("name", ["resnet50", "vit"])
def test_a_whole_network_is_compiled_once(name: str, method: str) -> None:
    if name == "vit":
        timm: Any = pytest.importorskip("timm")
        network = timm.create_model(
            "vit_small_patch16_224", img_size=32, depth=4, embed_dim=32, num_heads=2, num_classes=3
        )
    else:
        torchvision: Any = pytest.importorskip("torchvision")
        network = torchvision.models.resnet50(num_classes=3)
    check_compiled_once(network, method, 50, settled=30, size=32)


def test_other_algorithms_run_with_it() -> None:
    results = []
    for config in (None, {"backend": "eager"}):
        torch.manual_seed(1)
        algorithms = [StochasticDepth(drop_rate=0.5), LabelSmoothing(), ActivationCheckpointing()]
        results.append(train(tiny_resnet(), algorithms, 4, compile_config=config))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-6), name


@pytest.mark.slow
def test_a_compiled_run_resumes(tmp_path: Path) -> None:
    def run(duration: str, **settings: Any) -> dict[str, Any]:
        torch.manual_seed(1)
        model = tiny_resnet()
        Trainer(
            model,
            images(num_samples=24),
            images(num_samples=8),
            duration,
            StochasticDepth(drop_rate=0.5),
            torch.optim.SGD(model.parameters(), 0.1),
            device="cpu",
            compile_config={"backend": "eager"},
            **settings,
        ).fit()
        return dict(model.state_dict())

    whole = run("1ep")
    run("3ba", save_folder=tmp_path)
    resumed = run("1ep", save_folder=tmp_path, autoresume=True)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.slow
@on_ranks(2)
def test_compiled_ranks_train_alike() -> None:
    for parallelism in ("ddp", "fsdp"):
        results = []
        for config in (None, {"backend": "eager"}):
            torch.manual_seed(1)
            settings: dict[str, Any] = {"parallelism": parallelism, "compile_config": config}
            weights = train(tiny_resnet(), [StochasticDepth(drop_rate=0.5)], 4, **settings)
            results.append([t.full_tensor() if hasattr(t, "full_tensor") else t for t in weights.values()])
        for plain, compiled in zip(*results, strict=True):
            assert torch.allclose(plain, compiled, atol=1e-6)


def test_a_copy_of_the_model_is_not_compiled() -> None:
    model = LinearModel()
    Trainer(model, vectors(), None, "1ba", compile_config={"backend": "eager"}, device="cpu").fit()
    assert model._compiled_call_impl is not None
    assert copy.deepcopy(model)._compiled_call_impl is None


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ("max-autotune", TypeError, r"compile_config must be a dictionary of options of torch\.compile, .* got 'max-a"),
        (
            {"mod": "default"},
            ValueError,
            r"compile_config must have options of torch\.compile \(fullgraph, .*got 'mod'",
        ),
    ],
)
def test_bad_options_are_refused(config: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Trainer(LinearModel(), compile_config=config)
