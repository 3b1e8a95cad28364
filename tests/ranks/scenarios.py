"""What two processes do together. torchrun starts this once; every scenario is a function that asserts.

Usage: torchrun --nproc-per-node 2 scenarios.py FOLDER. Writes FOLDER/results.json: for each scenario the
error of each rank, None where it went well.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import etude.functional as cf
from etude import Algorithm, Callback, Event, LoggerDestination, Trainer
from etude.algorithms import StochasticDepth
from etude.trainer import CheckpointSaver, TrainingInterrupted, distributed, load_weights
from helpers.networks import LinearModel, images, tiny_resnet, vectors
from helpers.resumable import differences, make_trainer, result_of

RANK = int(os.environ.get("RANK", "0"))


def make_model() -> nn.Module:
    torch.manual_seed(5)
    return tiny_resnet(num_blocks=6)


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(model: nn.Module, data: Any, duration: str, *algorithms: Algorithm, **settings: Any) -> Trainer:
    trainer = Trainer(
        model, data, None, duration, algorithms, sgd(model), progress_bar=False, dist_timeout=60.0, **settings
    )
    trainer.fit()
    return trainer


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert pairs
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def assert_same_on_all_ranks(model: nn.Module) -> None:
    first, *others = distributed.gather(parameters(model))
    assert others
    for other in others:
        assert differences(first, other) == []


def train_with_ddp(data: Any, num_steps: int, **settings: Any) -> nn.Module:
    """The same training with DistributedDataParallel in a loop of its own."""
    model = cf.apply_stochastic_depth(make_model(), **settings)
    parallel, optimizer = DistributedDataParallel(model, find_unused_parameters=True), sgd(model)
    step = 0
    while step < num_steps:
        for X, y in data:
            mine = slice(RANK * len(X) // 2, (RANK + 1) * len(X) // 2)
            optimizer.zero_grad()
            model.loss(parallel([X[mine], y[mine]]), [X[mine], y[mine]]).backward()
            optimizer.step()
            step += 1
            if step == num_steps:
                break
    return model


def same_plan_equals_ddp() -> None:
    data = images(num_samples=40, batch_size=4)
    model = make_model()
    algorithm = StochasticDepth(drop_rate=0.6)
    train(model, data, "20ba", algorithm)
    assert 0.05 < sum(algorithm.realized_drop_rates) / 6 < 0.95
    assert largest_difference(model, train_with_ddp(data, 20, drop_rate=0.6)) == 0.0
    assert_same_on_all_ranks(model)


def different_plans_equal_ddp() -> None:
    data = images(num_samples=40, batch_size=4)
    for draws in ("independent", "balanced"):
        model = make_model()
        algorithm = StochasticDepth(drop_rate=0.6, use_same_gpu_seed=False, draws=draws)
        train(model, data, "20ba", algorithm)
        mine, other = distributed.gather(algorithm.realized_drop_rates)
        assert mine != other
        if draws == "balanced":
            assert sum(mine) == sum(other), "every rank drops as many blocks"
        reference = train_with_ddp(data, 20, drop_rate=0.6, use_same_gpu_seed=False, draws=draws)
        assert largest_difference(model, reference) == 0.0
        assert_same_on_all_ranks(model)


def sample_method_neither_hangs_nor_diverges() -> None:
    for draws in ("independent", "balanced"):
        model = make_model()
        algorithm = StochasticDepth(drop_rate=0.8, stochastic_method="sample", drop_distribution="uniform", draws=draws)
        train(model, images(num_samples=24, batch_size=4), "12ba", algorithm)
        assert_same_on_all_ranks(model)


def train_alone(model: nn.Module, data: Any, num_epochs: int) -> nn.Module:
    """The same training by one process on the joined batches, in a loop of its own."""
    cf.apply_stochastic_depth(model, drop_rate=0.5)
    optimizer = sgd(model)
    for _ in range(num_epochs):
        for batch in data:
            optimizer.zero_grad()
            model.loss(model(batch), batch).backward()
            optimizer.step()
    return model


def two_ranks_equal_one_on_the_joined_batch() -> None:
    """Also with a last batch that does not divide: 15 samples in batches of 6 leave 3, shared 1 and 2."""
    data = images(num_samples=15, batch_size=6)
    for microbatch_size in (None, 2):
        model = freeze_batchnorm(make_model())
        train(model, data, "3ep", StochasticDepth(drop_rate=0.5), device_train_microbatch_size=microbatch_size)
        alone = train_alone(freeze_batchnorm(make_model()), data, 3)
        assert largest_difference(model, alone) < 1e-5
        assert largest_difference(model, make_model()) > 1e-2


def two_ranks_with_synchronised_batchnorm_equal_one() -> None:
    """With and without momentum of the statistics, as copies and as shards; the last batch is shared 1 and 2."""
    data = images(num_samples=15, batch_size=6)
    X, y = data.dataset.tensors
    data.dataset.tensors = (X.double() + 3.0, y)
    for parallelism, momentum in (("ddp", 0.1), ("ddp", None), ("fsdp", 0.1)):
        model, alone = make_model().double(), make_model().double()
        for module in [*model.modules(), *alone.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        train(model, data, "3ep", StochasticDepth(drop_rate=0.5), sync_batchnorm=True, parallelism=parallelism)
        train_alone(alone, data, 3)
        found, expected = model.state_dict(), alone.state_dict()
        assert list(found) == list(expected)
        assert any("running_var" in name for name in expected)
        for name, tensor in found.items():
            tensor = tensor.full_tensor() if parallelism == "fsdp" and hasattr(tensor, "full_tensor") else tensor
            assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-12), (parallelism, momentum, name)
        assert largest_difference(alone, make_model().double()) > 1e-2
        if parallelism == "ddp":  # what is converted may be trained again
            train(cf.remove_stochastic_depth(model), data, "1ba", sync_batchnorm=True)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of every all-reduce of gradients."""
    reduce, sizes = dist.all_reduce, []

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype != torch.float64:  # what ranks tell each other is in double precision
            sizes.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = reduce


def dropped_blocks_send_nothing() -> None:
    class Compare(Algorithm):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_END

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            dropped = depth.plan.dropped_blocks
            expected = sum(parameter.nbytes for parameter in state.model.parameters())
            for block, is_dropped in zip(cf.stochastic_blocks(state.model), dropped, strict=True):
                if is_dropped:
                    shortcut = block.downsample
                    expected -= sum(p.nbytes for p in block.parameters())
                    expected += sum(p.nbytes for p in shortcut.parameters()) if shortcut is not None else 0
            assert sum(sizes) == expected, (sum(sizes), expected)
            self.seen.append((sum(dropped), len(sizes)))
            sizes.clear()

    for microbatch_size in (None, 1):  # gradients are averaged once per step, however many microbatches
        depth, compare = StochasticDepth(drop_rate=0.7), Compare()
        with counted_bytes() as sizes:
            data = images(num_samples=16, batch_size=4)
            train(make_model(), data, "20ba", depth, compare, device_train_microbatch_size=microbatch_size)
        assert len(compare.seen) == 20
        assert len({dropped for dropped, _ in compare.seen}) > 2
        assert all(sends <= 6 + 1 for _, sends in compare.seen), "one for each block and one for the rest"


def every_sample_is_evaluated_once() -> None:
    for num_samples, batch_size in ((5, 2), (7, 3), (9, 4), (2, 4), (33, 16)):
        data = images(num_samples=num_samples, batch_size=batch_size)
        model = make_model()
        trainer = Trainer(model, eval_dataloader=data, progress_bar=False)
        metrics = trainer.eval()
        model.eval()
        X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        with torch.no_grad():
            outputs = model([X, y])
        assert abs(metrics["loss/eval/total"] - float(model.loss(outputs, [X, y]))) < 1e-5
        accuracy = float((outputs.argmax(1) == y).float().mean())
        assert abs(metrics["metrics/eval/MulticlassAccuracy"] - accuracy) < 1e-6


def ranks_begin_with_the_weights_of_rank_zero() -> None:
    torch.manual_seed(RANK)
    model = LinearModel()
    assert distributed.gather(float(model.linear.weight[0, 0].detach()))[0] != distributed.gather(0.0)[0]
    train(model, vectors(), "1ba")
    assert_same_on_all_ranks(model)


def a_resume_ends_as_the_uninterrupted_run() -> None:
    for method in ("block", "sample"):
        whole, part = FOLDER / f"whole-{method}", FOLDER / f"part-{method}"
        trainer = make_trainer(method=method, callbacks=CheckpointSaver(whole, "1ba", num_to_keep=-1))
        trainer.fit()
        expected = result_of(trainer)
        saved = sorted(whole.glob("*.pt"))
        assert len(saved) == 12
        for path in saved:
            trainer = make_trainer(method=method, load_path=path)
            trainer.fit()
            found = differences(expected, result_of(trainer))
            assert found == [], (path.name, found)
        assert not part.exists()


def different_settings_are_refused() -> None:
    def with_other_seed() -> None:
        train(LinearModel(), vectors(), "1ba", seed=RANK)

    def with_other_rate() -> None:
        train(make_model(), images(), "1ba", StochasticDepth(drop_rate=0.1 + 0.1 * RANK))

    def that_fails_on_one_rank() -> None:
        train(LinearModel(), vectors(), "1ba", max_nonfinite_steps=-RANK)

    assert_refused(with_other_seed, "rank 1 differs from rank 0 in seed: 0 -> 1")
    assert_refused(with_other_rate, "rank 1 differs from rank 0 in algorithms.0")
    assert_refused(that_fails_on_one_rank, "max_nonfinite_steps must be a whole number of at least 0, got -1")


def data_that_cannot_be_shared_is_refused() -> None:
    for data, message in (
        (vectors(num_samples=10, batch_size=5), "batch_size that world_size=2 divides, got 5"),
        (vectors(num_samples=1, batch_size=2), "at least one sample for each of world_size=2 ranks, got 1"),
        (vectors(num_samples=9, batch_size=4), "drop_last=True"),
        (list(vectors()), "must be a torch DataLoader over a map-style dataset"),
    ):
        assert_refused(lambda data=data: train(LinearModel(), data, "1ba"), message)


def a_wrapped_model_is_refused() -> None:
    model = nn.Sequential(DistributedDataParallel(LinearModel()))
    model.loss = lambda outputs, batch: outputs.sum()
    assert_refused(lambda: train(model, vectors(), "1ba"), "must not be wrapped for parallel training")


def assert_refused(action: Callable[[], Any], message: str) -> None:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        assert message in str(error), f"{message!r} is not in {error}"
    else:
        raise AssertionError(f"nothing was raised, expected {message!r}")


class Branching(nn.Module):
    """A model that uses another branch on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.register_buffer("small", torch.full((3,), RANK, dtype=torch.int16))

    def forward(self, batch: Any) -> Tensor:
        return self.branches[RANK](batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])


def branches_of_a_models_own_are_found_or_allowed() -> None:
    torch.manual_seed(0)
    model = Branching()
    before = parameters(model)
    assert_refused(lambda: train(model, vectors(), "4ba"), "all ranks must use the same parameters in a step")
    assert differences(before, parameters(model)) == []
    train(model, vectors(), "4ba", find_unused_parameters=True)
    assert_same_on_all_ranks(model)
    assert model.small.tolist() == [0, 0, 0], "buffers of any kind are those of rank 0"
    for branch in ("branches.0.weight", "branches.1.weight"):
        assert not torch.equal(before[branch], parameters(model)[branch])


def what_ranks_do_together_must_be_asked_of_all() -> None:
    folder = FOLDER / "of-one-rank"
    only_here = {"save_folder": folder} if RANK == 0 else {}
    assert_refused(
        lambda: train(LinearModel(), vectors(), "1ba", **only_here), "rank 1 differs from rank 0 in callbacks"
    )
    data = {"eval_dataloader": vectors()} if RANK == 0 else {}
    assert_refused(lambda: Trainer(LinearModel(), progress_bar=False, **data), "rank 1 differs from rank 0 in eval")


def shards_and_microbatches_need_batches_that_divide() -> None:
    settings = {"parallelism": "fsdp", "device_train_microbatch_size": 1}
    data = images(num_samples=15, batch_size=6)
    assert_refused(lambda: train(make_model(), data, "1ep", **settings), "use drop_last=True")
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with counted_calls(scatter) as counts:
        train(make_model(), images(num_samples=16, batch_size=6), "1ep", **settings)
    assert counts[scatter] == 3, "once per step, however many microbatches"


def a_sharded_measurement_is_logged_whole() -> None:
    class LogNorm(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.AFTER_TRAIN_BATCH

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
            logger.log_metrics({"sum": sum(gradient.abs().sum() for gradient in gradients)})

    class Keep(LoggerDestination):
        def log_metrics(self, metrics: Any, step: int) -> None:
            found.extend(float(metrics["sum"]) for _ in range("sum" in metrics))

    found: list[float] = []
    sums = {}
    for parallelism in ("ddp", "fsdp"):
        train(make_model(), images(), "3ba", LogNorm(), loggers=Keep(), parallelism=parallelism)
        sums[parallelism], found[:] = list(found), []
    assert len(sums["ddp"]) == (3 if RANK == 0 else 0)
    assert all(abs(a - b) < 1e-4 * a for a, b in zip(sums["ddp"], sums["fsdp"], strict=True)), sums


class OnOneRank(Algorithm):
    """Does something on rank 1 at one step."""

    def __init__(self, event: Event, step: int, action: Callable[[Any], None]) -> None:
        self.event, self.step, self.action = event, step, action

    def match(self, event: Event, state: Any) -> bool:
        return event is self.event and state.timestamp.batch == self.step and state.rank == 1

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.action(state)


def make_nan(state: Any) -> None:
    state.loss = state.loss * float("nan")


def a_nan_on_one_rank_stops_all_before_the_update() -> None:
    kept: list[Any] = []

    class Keep(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_START and state.timestamp.batch == 3

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            kept.append(parameters(state.model))

    model = make_model()
    try:
        train(model, images(), "8ba", Keep(), OnOneRank(Event.AFTER_LOSS, 3, make_nan))
    except FloatingPointError as error:
        assert "the loss of step 3 is nan" in str(error)
    else:
        raise AssertionError("no rank stopped")
    assert len(kept) == 1
    assert differences(kept[0], parameters(model)) == []


def a_nan_on_one_rank_is_left_out_by_all() -> None:
    model = make_model()
    trainer = train(model, images(), "8ba", OnOneRank(Event.AFTER_LOSS, 3, make_nan), max_nonfinite_steps=1)
    assert trainer.state.timestamp.batch == 8
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert_same_on_all_ranks(model)


def out_of_memory_on_one_rank_halves_the_microbatches_of_all() -> None:
    def fail(state: Any) -> None:
        if state.device_train_microbatch_size is None:
            raise torch.OutOfMemoryError("pretended")

    data = images(num_samples=16, batch_size=8)
    model = make_model()
    trainer = train(
        model,
        data,
        "4ba",
        StochasticDepth(drop_rate=0.5),
        OnOneRank(Event.AFTER_FORWARD, 0, fail),
        device_train_microbatch_size="auto",
    )
    assert trainer.state.device_train_microbatch_size == 2
    expected = make_model()
    train(expected, data, "4ba", StochasticDepth(drop_rate=0.5), device_train_microbatch_size=2)
    assert differences(expected.state_dict(), model.state_dict()) == []
    assert_same_on_all_ranks(model)


def sigterm_on_one_rank_stops_all_after_the_same_step() -> None:
    expected = make_trainer()
    expected.fit()
    folder = FOLDER / "sigterm"
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(save_folder=folder, callbacks=StopOneRank(step=3))
    try:
        trainer.fit()
    except TrainingInterrupted as stop:
        assert stop.code == 143
    else:
        raise AssertionError("no rank stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.state.timestamp.batch == 4
    assert distributed.from_rank_zero(sorted(path.name for path in folder.iterdir())) == [
        "ep0-ba0.pt",
        "ep0-ba4.pt",
        "latest",
    ]
    resumed = make_trainer(save_folder=folder, autoresume=True)
    assert resumed.state.timestamp.batch == 4
    resumed.fit()
    assert differences(result_of(expected), result_of(resumed)) == []


class StopOneRank(Callback):
    """Sends rank 1 a SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_forward(self, state: Any, logger: Any) -> None:
        if state.rank == 1 and state.timestamp.batch == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def plans_that_differ_are_found_in_debug_mode() -> None:
    dist.set_debug_level(dist.DebugLevel.INFO)
    model = cf.apply_stochastic_depth(make_model(), drop_rate=0.5, seed=RANK)
    try:
        assert_refused(lambda: model(next(iter(images()))), "all ranks must drop the same blocks, but at step 0")
        train(make_model(), images(), "2ba", StochasticDepth(drop_rate=0.5))
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


def a_loop_with_the_wrong_ddp_is_refused() -> None:
    model = cf.apply_stochastic_depth(make_model(), drop_rate=0.5)
    batch = next(iter(images()))
    assert_refused(lambda: DistributedDataParallel(model)(batch), "must have find_unused_parameters=True")
    static = DistributedDataParallel(model, find_unused_parameters=True, static_graph=True)
    assert_refused(lambda: static(batch), "must have static_graph=False")
    assert_refused(
        lambda: cf.apply_stochastic_depth(DistributedDataParallel(make_model())),
        "must have find_unused_parameters=True",
    )


@contextmanager
def counted_calls(*names: str) -> Iterator[dict[str, int]]:
    """How often each of these functions of torch.distributed is called."""
    originals = {name: getattr(dist, name) for name in names}
    counts = dict.fromkeys(names, 0)

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def sharding_equals_copies_and_dropped_blocks_cost_nothing() -> None:
    class Count(Algorithm):
        def __init__(self) -> None:
            self.seen: dict[int, set[tuple[int, int]]] = {}

        def match(self, event: Event, state: Any) -> bool:
            return event is Event.BATCH_END

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            self.seen.setdefault(sum(depth.plan.dropped_blocks), set()).add((counts[gather], counts[scatter]))
            counts.update({gather: 0, scatter: 0})

    is_new = hasattr(dist, "all_gather_single")  # the names of torch 2.15
    gather = "all_gather_single" if is_new else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if is_new else "reduce_scatter_tensor"
    data = images(num_samples=40, batch_size=4)
    copies, sharded = make_model(), make_model()
    train(copies, data, "20ba", StochasticDepth(drop_rate=0.7))
    depth, count = StochasticDepth(drop_rate=0.7), Count()
    with counted_calls(gather, scatter) as counts:
        train(sharded, data, "20ba", depth, count, parallelism="fsdp")
    for one, other in zip(copies.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())
    assert sum(p.to_local().numel() for p in sharded.parameters()) < 0.6 * sum(p.numel() for p in copies.parameters())
    assert len(count.seen) > 2
    first, counts_of_first = next((dropped, list(counts)) for dropped, counts in count.seen.items())
    assert counts_of_first[0][1] == 7 - first, "each block and the rest is reduced once, what is dropped is not"
    for dropped, each in count.seen.items():
        # a block that is kept is gathered for its forward and for its backward
        more = dropped - first
        assert each == {(counts_of_first[0][0] - 2 * more, counts_of_first[0][1] - more)}, count.seen


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()}


def sharded_runs_resume_and_go_on_as_copies() -> None:
    """On two ranks the arithmetic of shards is that of copies, so that every mixture ends the same, bit by bit."""
    sharded, copies = FOLDER / "sharded", FOLDER / "copies"
    whole = make_trainer(parallelism="fsdp", callbacks=CheckpointSaver(sharded, "1ba", num_to_keep=-1))
    whole.fit()
    expected = whole_state(whole.state.model)
    assert len(list(sharded.glob("*.shards"))) == len(list(sharded.glob("*.pt"))) == 12
    make_trainer(callbacks=CheckpointSaver(copies, "4ba", num_to_keep=-1)).fit()
    assert not list(copies.glob("*.shards"))
    for path, parallelism in (
        (sharded / "ep0-ba3.pt", "fsdp"),
        (sharded / "ep1-ba7.pt", "fsdp"),
        (sharded / "ep0-ba4.pt", "ddp"),
        (copies / "ep0-ba4.pt", "fsdp"),
    ):
        trainer = make_trainer(parallelism=parallelism, load_path=path)
        trainer.fit()
        assert differences(expected, whole_state(trainer.state.model)) == [], (path, parallelism)
    if RANK == 0:
        assert differences(expected, load_weights(sharded / "ep2-ba10.pt")) == []
        assert differences(expected, load_weights(copies / "ep2-ba10.pt")) == []


def sharding_with_different_plans_is_refused() -> None:
    for settings in ({"use_same_gpu_seed": False}, {"stochastic_method": "sample"}):
        assert_refused(
            lambda settings=settings: train(
                make_model(), images(), "1ba", StochasticDepth(**settings), parallelism="fsdp"
            ),
            "needs all ranks to compute the same blocks",
        )


SCENARIOS = [
    same_plan_equals_ddp,
    different_plans_equal_ddp,
    sample_method_neither_hangs_nor_diverges,
    two_ranks_equal_one_on_the_joined_batch,
    two_ranks_with_synchronised_batchnorm_equal_one,
    dropped_blocks_send_nothing,
    every_sample_is_evaluated_once,
    ranks_begin_with_the_weights_of_rank_zero,
    a_resume_ends_as_the_uninterrupted_run,
    different_settings_are_refused,
    data_that_cannot_be_shared_is_refused,
    a_wrapped_model_is_refused,
    branches_of_a_models_own_are_found_or_allowed,
    what_ranks_do_together_must_be_asked_of_all,
    shards_and_microbatches_need_batches_that_divide,
    a_sharded_measurement_is_logged_whole,
    a_nan_on_one_rank_stops_all_before_the_update,
    a_nan_on_one_rank_is_left_out_by_all,
    out_of_memory_on_one_rank_halves_the_microbatches_of_all,
    sigterm_on_one_rank_stops_all_after_the_same_step,
    plans_that_differ_are_found_in_debug_mode,
    a_loop_with_the_wrong_ddp_is_refused,
    sharding_equals_copies_and_dropped_blocks_cost_nothing,
    sharded_runs_resume_and_go_on_as_copies,
    sharding_with_different_plans_is_refused,
]

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    chosen = sys.argv[2:]
    torch.set_num_threads(1)
    distributed.join_process_group(torch.device("cpu"), timeout=60.0)
    results: dict[str, list[str | None]] = {}
    for scenario in SCENARIOS:
        if chosen and scenario.__name__ not in chosen:
            continue
        error = None
        try:
            scenario()
        except Exception:
            error = traceback.format_exc()
        results[scenario.__name__] = distributed.gather(error)
        if RANK == 0:
            (FOLDER / "results.json").write_text(json.dumps(results))
