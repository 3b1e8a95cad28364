"""The private parts of torch that etude uses.

When a new torch changes one of them, a test here names it and fails.
"""

import ast
import copy
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR, StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

import etude
from etude.algorithms.ema import torch_internals as ema_internals
from etude.algorithms.stochastic_depth import torch_internals as depth_internals
from etude.trainer import torch_internals

ROOT = Path(etude.__file__).parent
NOT_THE_PACKAGE = {"tests", "benchmarks", "docs", "build", ".venv"}
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_THE_PACKAGE]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names_defined_in(tree: ast.AST) -> set[str]:
    """Functions, classes, variables and attributes of `self` and `cls` with a leading underscore."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def private_names_used_in(tree: ast.AST) -> set[str]:
    """Attributes, imported names, imported modules and strings (of getattr and the like) that are private names."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Import):
            found.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."), (alias.name for alias in node.names))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.isupper():
            found.add(node.value)
    return {name for name in found if is_private(name) and name.isidentifier()}


@functools.cache
def own_private_names() -> set[str]:
    return set.union(*(private_names_defined_in(ast.parse(path.read_text())) for path in SOURCES))


PUBLIC_ALL_THE_SAME = {"_asdict", "_fields", "_make", "_replace"}  # the documented members of a namedtuple


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_other_packages_are_used_in_torch_internals_only(path: Path) -> None:
    foreign = private_names_used_in(ast.parse(path.read_text())) - own_private_names() - PUBLIC_ALL_THE_SAME
    assert not foreign or path.name == "torch_internals.py"


def test_the_search_for_private_names_finds_them() -> None:
    program = (
        "import torch._dynamo\nfrom torch.optim import _f\nx = getattr(y, '_workers')\ntorch._C.f()\nself._own = 1"
    )
    assert private_names_used_in(ast.parse(program)) == {"_dynamo", "_f", "_workers", "_C", "_own"}
    assert private_names_defined_in(ast.parse(program)) == {"_own"}


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class TestEMA:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_averages_move_together(self, dtype: torch.dtype) -> None:
        """`torch._foreach_sub`, `torch._foreach_mul_` with a scalar tensor, and `torch._foreach_add_`."""
        averages = [torch.randn(3, dtype=dtype), torch.randn(2, 2, dtype=dtype)]
        tensors = [torch.randn_like(average) for average in averages]
        before = [average.clone() for average in averages]
        ema_internals.move_together(averages, tensors, torch.zeros(()))
        assert all(map(torch.equal, averages, before))
        ema_internals.move_together(averages, tensors, torch.tensor(0.25))
        for found, old, tensor in zip(averages, before, tensors, strict=True):
            assert found.dtype is dtype
            torch.testing.assert_close(found, old + 0.25 * (tensor - old))


class TestTrainer:
    @pytest.mark.parametrize("flag", [0.0, 1.0])
    @pytest.mark.parametrize("fused", [False, True])
    def test_a_flag_is_an_overflow_that_leaves_the_scale(self, flag: float, fused: bool) -> None:
        """`GradScaler._found_inf_per_device`, `_scale`, `_growth_tracker` and `_per_optimizer_states`."""
        parameter = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([parameter], lr=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
        scaler.scale(parameter.sum()).backward()
        scaler.unscale_(optimizer)
        torch_internals.discard_unscaled(scaler)
        parameter.grad = torch.full((2,), 8.0)
        scaler.unscale_(optimizer)  # which would raise if it had been unscaled already
        torch_internals.flag_as_overflow(scaler, optimizer, torch.tensor(flag))
        scaler.step(optimizer)
        torch_internals.update_scale_unless(scaler, torch.tensor(flag))
        assert parameter.tolist() == ([1.0, 1.0] if flag else [0.5, 0.5])
        assert scaler.get_scale() == (8.0 if flag else 16.0)

    def test_batchnorm_base_is_the_base_of_every_batchnorm_that_torch_converts(self) -> None:
        """`torch.nn.modules.batchnorm._BatchNorm`."""
        for layer in (nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)):
            assert isinstance(layer, torch_internals.BatchNormBase)
        for other in (nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2)):
            assert not isinstance(other, torch_internals.BatchNormBase)

        class Own(torch_internals.BatchNormBase):
            """Converted too, so `convert_batchnorm` must see it."""

        assert type(nn.SyncBatchNorm.convert_sync_batchnorm(Own(2))) is nn.SyncBatchNorm

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("value", [0.0, -1e-3, 6e4, float("nan"), float("inf"), -float("inf")])
    def test_a_value_that_is_not_finite_is_flagged_and_no_value_changes(self, value: float, dtype: torch.dtype) -> None:
        """`torch._amp_foreach_non_finite_check_and_unscale_`."""
        tensors = [torch.randn(3, 70, dtype=dtype), torch.full((2, 2), 0.5, dtype=dtype), torch.ones((), dtype=dtype)]
        tensors[1][1, 0] = value
        before = [tensor.clone() for tensor in tensors]
        flag = torch.zeros(())
        torch_internals.flag_nonfinite(tensors, flag, torch.ones(()))
        assert flag.item() == (0.0 if abs(value) < float("inf") else 1.0)
        for one, other in zip(before, tensors, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)

    def test_a_change_in_place_changes_the_version(self) -> None:
        """`Tensor._version`."""
        tensor = torch.zeros(2)
        before = torch_internals.version_of(tensor)
        tensor.add_(1)
        assert torch_internals.version_of(tensor) != before

    def test_the_slots_of_buffers_hold_those_that_are_none(self) -> None:
        """`nn.Module._buffers`."""
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        module.register_buffer("later", None)
        slots = torch_internals.buffer_slots(module)
        assert list(slots) == ["later", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
        assert slots["1.running_mean"] == (module[1], "running_mean")

    def test_workers_are_found_and_shut_down(self) -> None:
        """`_MultiProcessingDataLoaderIter._workers` and `_shutdown_workers`."""
        iterator = iter(DataLoader(Numbers(), num_workers=2))
        workers = torch_internals.worker_processes(iterator)
        assert len(workers) == 2
        assert all(worker.is_alive() for worker in workers)
        torch_internals.shut_down_workers(iterator)
        assert not any(worker.is_alive() for worker in workers)

    def test_iterators_without_workers_have_none(self) -> None:
        assert torch_internals.worker_processes(iter(DataLoader(Numbers()))) == []
        assert torch_internals.worker_processes(iter([1])) == []

    def test_a_copy_without_workers_starts_its_own_beside_persistent_ones(self) -> None:
        """`DataLoader._iterator`, in which a DataLoader keeps its persistent workers."""
        dataloader = DataLoader(Numbers(), num_workers=1, persistent_workers=True)
        iterators = [iter(dataloader), iter(torch_internals.without_workers(dataloader)), iter(dataloader)]
        try:
            pids = [torch_internals.worker_processes(iterator)[0].pid for iterator in iterators]
            assert pids[0] == pids[2] != pids[1]
        finally:
            for iterator in iterators[:2]:
                torch_internals.shut_down_workers(iterator)

    @pytest.mark.parametrize("is_marked", [True, False])
    def test_a_scheduler_may_step_first_with_an_optimizer_marked_as_stepped(self, is_marked: bool) -> None:
        """`Optimizer._opt_called`."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        scheduler = StepLR(optimizer, 1)
        if is_marked:
            torch_internals.mark_stepped(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler.step()
        assert ["before `optimizer.step()`" in str(warning.message) for warning in caught] == [True] * (not is_marked)

    def test_a_copied_optimizer_steps_without_any_hooks(self) -> None:
        """`Optimizer._optimizer_step_pre_hooks` and `_optimizer_step_post_hooks`, and `__wrapped__` of ``step``."""
        calls: list[str] = []
        parameter = nn.Parameter(torch.ones(1))
        parameter.grad = torch.ones(1)
        optimizer = torch.optim.SGD([parameter], lr=0.25)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        with register_optimizer_step_post_hook(lambda *_: calls.append("global")):
            torch_internals.step_without_hooks(torch_internals.copy_without_hooks(optimizer))
            assert (parameter.item(), calls) == (0.75, [])
            optimizer.step()
        assert (parameter.item(), calls) == (0.5, ["pre", "post", "global"])

    def test_schedulers_inside_another_are_found(self) -> None:
        """`SequentialLR._schedulers` and `ChainedScheduler._schedulers`."""
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        inner: list[LRScheduler] = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
        for outer in (SequentialLR(optimizer, inner, [3]), ChainedScheduler(inner, optimizer)):
            state, found = torch_internals.split_scheduler(outer)
            assert found == inner
            assert not any(isinstance(value, list) and isinstance(value[0], dict) for value in state.values())
        assert torch_internals.split_scheduler(inner[0]) == (inner[0].state_dict(), [])

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_storage_info_is_what_a_saved_checkpoint_holds(self, tmp_path: Path) -> None:
        """`torch.distributed.checkpoint.filesystem._StorageInfo`."""
        dcp: Any = importlib.import_module("torch.distributed.checkpoint")  # its stubs leave most of it out
        metadata = dcp.save({"weight": torch.arange(3.0)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
        (saved,) = metadata.storage_data.values()
        rebuilt = torch_internals.storage_info(saved.relative_path, saved.offset, saved.length)
        assert type(rebuilt) is type(saved)
        assert rebuilt == saved


class TestStochasticDepth:
    def test_in_backward_only_while_a_checkpointed_forward_is_recomputed(self) -> None:
        """`torch._C._current_graph_task_id`."""
        seen = []

        def forward(x: Tensor) -> Tensor:
            seen.append(depth_internals.is_in_backward())
            return x.sin()

        x = torch.ones(2, requires_grad=True)
        checkpoint(forward, x, use_reentrant=False).sum().backward()
        assert seen == [False, True]
        assert not depth_internals.is_in_backward()

    @pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
    def test_tracing_is_known_inside_it(self) -> None:
        """`torch._C._is_tracing`."""
        seen: list[bool] = []

        def function(x: Tensor) -> Tensor:
            seen.append(depth_internals.is_tracing())
            return x + 1

        torch.jit.trace(function, torch.ones(2), check_trace=False)
        function(torch.ones(2))
        assert seen == [True, False]

    def test_a_transform_of_torch_func_is_known_inside_it(self) -> None:
        """`torch._C._are_functorch_transforms_active`."""
        seen: list[bool] = []

        def function(x: Tensor) -> Tensor:
            seen.append(depth_internals.is_transforming())
            return x.sum()

        torch.func.grad(function)(torch.ones(2))
        function(torch.ones(2, requires_grad=True)).backward()
        assert seen == [True, False]

    def test_the_active_ddp_is_known_inside_its_forward(self, tmp_path: Path) -> None:
        """`DistributedDataParallel._active_ddp_module`."""
        seen = []

        class Model(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                seen.append(depth_internals.active_ddp())
                return super().forward(input)

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(Model(2, 2))
            parallel(torch.ones(1, 2))
            assert seen == [parallel]
            assert depth_internals.active_ddp() is None
        finally:
            dist.destroy_process_group()

    def test_a_size_marked_dynamic_is_compiled_once(self) -> None:
        """`torch._dynamo.maybe_mark_dynamic`."""

        def num_graphs(is_marked: bool) -> int:
            graphs = []

            def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
                graphs.append(graph)
                return graph.forward

            torch.compiler.reset()
            compiled = torch.compile(lambda x: x * 2, backend=backend)
            for size in (3, 5):
                x = torch.ones(size, 2)
                if is_marked:
                    depth_internals.maybe_mark_dynamic(x, 0)
                compiled(x)
            return len(graphs)

        assert num_graphs(is_marked=True) == 1
        assert num_graphs(is_marked=False) == 2

    def test_only_hooks_of_the_given_classes_are_removed(self) -> None:
        """`Module._forward_pre_hooks`, `_forward_hooks` and the two dictionaries of their options."""
        calls = []

        class Hook:
            def __call__(self, module: nn.Module, *args: Any) -> None:
                calls.append("removed")

        def add_hooks(hook: Any) -> None:
            model.register_forward_pre_hook(hook, with_kwargs=True)
            model.register_forward_hook(hook, always_call=True)

        model = nn.Linear(2, 2)
        before = copy.deepcopy(model.__dict__)
        add_hooks(Hook())
        model(torch.ones(1, 2))
        assert calls == ["removed"] * 2
        depth_internals.remove_forward_hooks(model, Hook)
        assert {name: value for name, value in model.__dict__.items() if "hooks" in name} == {
            name: value for name, value in before.items() if "hooks" in name
        }
        add_hooks(lambda *args: calls.append("kept"))
        add_hooks(Hook())
        depth_internals.remove_forward_hooks(copied := copy.deepcopy(model), Hook)
        copied(torch.ones(1, 2))
        assert calls == ["removed"] * 2 + ["kept"] * 2
