"""FSDP on two ranks equals DDP; dropped blocks are neither gathered nor reduced."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchvision.models.resnet import Bottleneck

from etude import Algorithm, Event, LoggerDestination
from etude.algorithms import StochasticDepth
from etude.trainer import CheckpointSaver, load_weights
from helpers.networks import images
from helpers.parallel_training import counted_calls, make_model, train, whole_state
from helpers.ranks import on_ranks, run_on_ranks
from helpers.resumable import differences, make_trainer


@on_ranks(2)
def test_sharding_equals_copies_and_dropped_blocks_cost_nothing() -> None:
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
    shards: list[Any] = list(sharded.parameters())
    for one, other in zip(copies.parameters(), shards, strict=True):
        assert torch.equal(one, other.full_tensor())
    assert sum(p.to_local().numel() for p in shards) < 0.6 * sum(p.numel() for p in copies.parameters())
    assert len(count.seen) > 2
    first, counts_of_first = next((dropped, list(counts)) for dropped, counts in count.seen.items())
    assert counts_of_first[0][1] == 7 - first, "each block and the rest is reduced once, what is dropped is not"
    for dropped, each in count.seen.items():
        # a block that is kept is gathered for its forward and for its backward
        more = dropped - first
        assert each == {(counts_of_first[0][0] - 2 * more, counts_of_first[0][1] - more)}, count.seen


@on_ranks(2)
@pytest.mark.parametrize("size", [None, 1])
def test_only_the_next_executed_block_is_prefetched(size: int | None) -> None:
    """In the forward pass each gather begins before the layers before it have run, and all that is gathered runs."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    model = make_model()
    depth = StochasticDepth(drop_rate=0.7, drop_distribution="uniform")
    counts: dict[str, int]
    gathered_before: list[int] = []  # for each block that runs, how many gathers there were before its first layer
    needed: list[tuple[int, int]] = []  # for each forward, gathers and units

    class Watch(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event in (Event.BEFORE_FORWARD, Event.AFTER_FORWARD)

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            if event is Event.BEFORE_FORWARD:
                state.model.reshard()
                counts.update({gather: 0})
                gathered_before.clear()
            else:
                num_blocks = len(gathered_before)
                ahead = [min(number + 3, num_blocks + 1) for number in range(num_blocks)]  # the rest of the model first
                assert gathered_before == ahead
                needed.append((counts[gather], len(gathered_before) + 1))

    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.conv1.register_forward_pre_hook(lambda *_: gathered_before.append(counts[gather]))
    with counted_calls(gather) as counts:
        settings: dict[str, Any] = {"parallelism": "fsdp", "device_train_microbatch_size": size}
        train(model, images(num_samples=16, batch_size=4), "1ep", depth, Watch(), **settings)
    assert all(gathers == units for gathers, units in needed), needed
    assert len({units for _, units in needed}) > 1


@pytest.mark.slow
@on_ranks(2)
def test_sharded_runs_resume_as_shards_or_as_copies(tmp_path: Path) -> None:
    """On two ranks the arithmetic of shards is that of copies, so that every mixture ends the same, bit by bit."""
    sharded, copies = tmp_path / "sharded", tmp_path / "copies"
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
    if dist.get_rank() == 0:
        assert differences(expected, load_weights(sharded / "ep2-ba10.pt", folded=False)) == []
        assert differences(expected, load_weights(copies / "ep2-ba10.pt", folded=False)) == []


@on_ranks(2)
def test_gradients_are_reduced_once_per_step_however_many_microbatches() -> None:
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    with counted_calls(scatter) as counts:
        data = images(num_samples=16, batch_size=6)
        train(make_model(), data, "1ep", parallelism="fsdp", device_train_microbatch_size=1)
    assert counts[scatter] == 3


@on_ranks(2)
def test_a_sharded_measurement_is_logged_whole() -> None:
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
    assert len(sums["ddp"]) == (3 if dist.get_rank() == 0 else 0)
    assert all(abs(a - b) < 1e-4 * a for a, b in zip(sums["ddp"], sums["fsdp"], strict=True)), sums


def save_shards(folder: Path) -> None:
    make_trainer(parallelism="fsdp", callbacks=CheckpointSaver(folder, "4ba", num_to_keep=-1)).fit()


@pytest.fixture
def shards_of_two_ranks(tmp_path: Path) -> Path:
    run_on_ranks(2, save_shards, folder=tmp_path)
    return tmp_path / "ep0-ba4.pt"


@pytest.mark.xdist_group("ranks")
def test_one_process_resumes_from_the_shards_of_two(shards_of_two_ranks: Path) -> None:
    trainer = make_trainer(load_path=shards_of_two_ranks)
    assert differences(load_weights(shards_of_two_ranks, folded=False), trainer.state.model.state_dict()) == []
    assert len(trainer.state.optimizers[0].state_dict()["state"]) > 10
    trainer.fit()
    assert trainer.state.timestamp.batch == 10


@on_ranks(2)
def test_shards_are_saved_to_a_file_of_any_name_and_loaded(tmp_path: Path) -> None:
    trainer = make_trainer(parallelism="fsdp")
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    make_trainer(parallelism="fsdp", load_path=tmp_path / "final.ckpt")
    assert load_weights(tmp_path / "final.ckpt").keys() == trainer.state.model.state_dict().keys()


@pytest.mark.xdist_group("ranks")
def test_a_changed_shard_is_refused(shards_of_two_ranks: Path) -> None:
    shard = next(shards_of_two_ranks.parent.glob("ep0-ba4.pt.*.shards")) / "__1_0.distcp"
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    with pytest.raises(ValueError, match="its shards are missing or damaged"):
        make_trainer(load_path=shards_of_two_ranks)
