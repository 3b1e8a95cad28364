"""The host reads one value per step from the device, that of the previous step."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from etude import Algorithm, Event, Trainer
from etude.algorithms import EMA, GradientClipping, LabelSmoothing, StochasticDepth
from etude.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor
from etude.engine import Engine, Logger, State
from etude.trainer.data.batches import copy_stream, move, split
from etude.trainer.flags import flag_step
from etude.trainer.precision import Precision
from helpers.networks import images, tiny_resnet
from helpers.ranks import on_ranks

NUM_STEPS = 20
FIRST_LOOKS = 4  # at the first step each block looks whether its input ends in a ReLU, as it does itself
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "__format__")
READING_OPERATORS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2")


class Reads(TorchDispatchMode):
    """Counts how often each way to read a tensor is taken, inside `watch`; one that goes through others counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._is_reading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READING_OPERATORS and not self._is_reading:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watch(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(Tensor, name, self._counting(name))
            with self:
                yield

    def _counting(self, name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            if self._is_reading:
                return original(*args, **kwargs)
            self.counts[name] += 1
            self._is_reading = True
            try:
                return original(*args, **kwargs)
            finally:
                self._is_reading = False

        return read


class Count(Algorithm):
    """Notes at the end of each batch how many reads there were so far."""

    def __init__(self, reads: Reads) -> None:
        self._reads, self._seen = reads, list[Counter[str]]()

    @property
    def per_step(self) -> list[int]:
        totals = [sum(seen.values()) for seen in self._seen]
        return [after - before for before, after in zip([0, *totals], totals, strict=False)]

    @property
    def until_the_last_step(self) -> Counter[str]:
        return self._seen[-1]

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.BATCH_END

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self._seen.append(Counter(self._reads.counts))


def make_trainer(reads: Reads, optimizer: str, **settings: Any) -> tuple[Trainer, Count]:
    model, count = tiny_resnet(), Count(reads)
    made = {
        "fused SGD": lambda: SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True),
        "fused AdamW": lambda: AdamW(model.parameters(), fused=True),
        "SGD": lambda: SGD(model.parameters(), lr=0.05, momentum=0.9),
    }[optimizer]()
    trainer = Trainer(
        model,
        images(num_samples=4 * NUM_STEPS, batch_size=4),
        None,
        "1ep",
        [StochasticDepth(drop_rate=0.5), LabelSmoothing(0.1), count],
        made,
        device="cpu",
        **settings,
    )
    return trainer, count


@pytest.mark.parametrize("optimizer", ["fused SGD", "fused AdamW", "SGD"])
@pytest.mark.parametrize("settings", [{}, {"device_train_microbatch_size": 2}, {"max_nonfinite_steps": 2}], ids=str)
def test_one_value_is_read_per_step(
    optimizer: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(reads, optimizer, **settings)
        reads.counts.clear()
        trainer.fit()
    first, *others = count.per_step
    late = optimizer != "SGD"
    assert first == FIRST_LOOKS + (0 if late else 1), "a fused optimizer does not wait for the flags of its step"
    assert set(others) == {1}
    assert set(count.until_the_last_step) == {"tolist", "__bool__"}
    assert count.until_the_last_step["__bool__"] == FIRST_LOOKS


@pytest.mark.parametrize("optimizer", ["fused SGD", "fused AdamW"])
@pytest.mark.parametrize("settings", [{}, {"device_train_microbatch_size": 2}, {"max_nonfinite_steps": 2}], ids=str)
def test_one_value_is_read_per_step_with_a_loss_scaler(optimizer: str, settings: dict[str, Any]) -> None:
    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(reads, optimizer, precision="amp_fp16", **settings)
        reads.counts.clear()
        trainer.fit()
    first, *others = count.per_step
    assert first == FIRST_LOOKS
    assert set(others) == {1}


def test_monitors_read_nothing() -> None:
    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(reads, "fused SGD", callbacks=[SpeedMonitor(), MemoryMonitor(), LRMonitor()])
        reads.counts.clear()
        trainer.fit()
    assert set(count.per_step[1:]) == {1}


@pytest.mark.parametrize("optimizer", ["fused SGD"])
def test_files_are_written_in_groups_of_rows(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and metrics wait on the device until a group of rows is written."""
    monkeypatch.chdir(tmp_path)
    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(reads, optimizer, run_name="run")
        reads.counts.clear()
        trainer.fit()
    per_step = count.per_step
    assert sum(number != 1 for number in per_step[1:]) <= 3, per_step


@on_ranks(2)
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_one_value_is_read_per_step_on_two_ranks(microbatch_size: int | None, tmp_path: Path) -> None:
    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(
            reads, "fused SGD", device_train_microbatch_size=microbatch_size, progress_bar=False
        )
        reads.counts.clear()
        trainer.fit()
    _, *others = count.per_step  # before the first step, ranks compare the arguments of fit
    assert others == [1] * (NUM_STEPS - 1)


def test_a_read_of_the_running_step_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadLoss(Algorithm):
        def match(self, event: Event, state: Any) -> bool:
            return event is Event.AFTER_LOSS

        def apply(self, event: Event, state: Any, logger: Any) -> None:
            float(state.loss.detach())

    reads = Reads()
    with reads.watch():
        trainer, count = make_trainer(reads, "fused SGD")
        trainer.state.algorithms = (ReadLoss(), *trainer.state.algorithms)
        reads.counts.clear()
        trainer.fit()
    assert set(count.per_step[1:]) == {2}


@pytest.mark.parametrize("method", ["block", "sample"])
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_pass_runs_where_every_read_is_an_error(method: Any, microbatch_size: int | None) -> None:
    """The meta device holds no values, so that whatever reads one raises."""
    depth, smoothing = StochasticDepth(drop_rate=0.5, stochastic_method=method), LabelSmoothing(0.1)
    others = (GradientClipping("norm", 1.0), GradientClipping("adaptive", 0.1), EMA("2ba"))
    model: Any = tiny_resnet().to("meta")
    state = State(model=model, algorithms=(depth, smoothing, *others), device=torch.device("meta"))
    engine = Engine(state, Logger(state))
    engine.run_event(Event.INIT)
    batch = [torch.empty(6, 3, 8, 8, device="meta"), torch.empty(6, dtype=torch.long, device="meta")]
    for step in range(6):
        state.timestamp = state.timestamp.to_next_batch(6)
        state.batch, state.batch_num_samples = batch, 6
        engine.run_event(Event.BATCH_START)
        start = 0
        for microbatch in split(batch, microbatch_size or 6):
            state.batch, state.microbatch_start = microbatch, start
            state.microbatch_num_samples = len(microbatch[0])
            start += state.microbatch_num_samples
            engine.run_event(Event.BEFORE_FORWARD)
            state.outputs = model(state.batch)
            engine.run_event(Event.AFTER_FORWARD)
            engine.run_event(Event.BEFORE_LOSS)
            state.loss = model.loss(state.outputs, state.batch)
            engine.run_event(Event.AFTER_LOSS)
            state.loss.backward()
        assert model.module[0].weight.grad is not None, step
        engine.run_event(Event.AFTER_TRAIN_BATCH)
        engine.run_event(Event.BATCH_END)
        state.found_nonfinite = torch.zeros((), device="meta")  # from the second update on
        with pytest.raises((RuntimeError, NotImplementedError)):
            state.loss.item()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU (torch.cuda.is_available() is False)")


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class WithoutWaits(Algorithm):
    """From the start of a batch to its end the host must not wait, except for the flags of the step before."""

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.BATCH_START, Event.BATCH_END) and state.timestamp.batch > 1

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if event is Event.BATCH_START else "default")


def train_on(device: str, precision: Precision = "fp32", *algorithms: Algorithm, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = tiny_resnet()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    trainer = Trainer(
        model,
        images(num_samples=40, batch_size=4),
        None,
        settings.pop("max_duration", "10ba"),
        [*algorithms, StochasticDepth(drop_rate=0.5), LabelSmoothing(0.1)],
        optimizer,
        device=device,
        precision=precision,
        progress_bar=False,
        **settings,
    )
    trainer.fit()
    return trainer


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("settings", [{}, {"device_train_microbatch_size": 2}, {"max_nonfinite_steps": 2}], ids=str)
def test_the_gpu_is_never_waited_for(precision: Any, settings: dict[str, Any]) -> None:
    try:
        trainer = train_on("gpu", precision, WithoutWaits(), **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.timestamp.batch == 10


@pytest.mark.gpu
@gpu
def test_the_gpu_computes_what_the_cpu_does() -> None:
    on_cpu, on_gpu = (train_on(device).state.model.state_dict() for device in ("cpu", "gpu"))
    for name, tensor in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@gpu
def test_a_batch_is_copied_while_the_gpu_is_busy() -> None:
    """The copy does not wait for the work before it, and the work after it waits for the copy."""
    device = torch.device("cuda", torch.cuda.current_device())
    stream = copy_stream(device)
    assert stream is not None
    host = {"image": torch.rand(1 << 20).pin_memory(), "names": ["a"]}
    large = torch.rand(8192, 8192, device=device)
    for _ in range(20):
        large = large @ large
        large /= large.norm()
    busy = torch.cuda.Event()
    busy.record()
    batch = move(host, device, stream)
    stream.synchronize()
    assert not busy.query()
    assert torch.equal((batch["image"] + 1).cpu(), host["image"] + 1)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", "amp_fp16"])
def test_a_resume_on_the_gpu_is_bit_exact(precision: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"deterministic_mode": True}
    whole = train_on("gpu", precision, save_folder=tmp_path, save_interval="5ba", **settings)
    resumed = train_on("gpu", precision, load_path=tmp_path / "ep0-ba5.pt", **settings)
    for name, tensor in whole.state.model.state_dict().items():
        assert torch.equal(resumed.state.model.state_dict()[name], tensor), name


@pytest.mark.gpu
@gpu
def test_flags_on_the_gpu_are_copied_without_waiting() -> None:
    loss, gradients = torch.ones((), device="cuda"), [torch.ones(3, device="cuda"), torch.ones(2, device="cuda")]
    gradients[1][0] = float("nan")
    with no_synchronization():
        flags = flag_step(loss, gradients)
    assert flags.read().is_nonfinite
