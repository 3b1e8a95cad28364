"""Finding the residual branch of a block by torch.fx tracing."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import etude.functional as cf
from etude.algorithms import StochasticDepth


class DropPath(nn.Module):
    """A drop path as timm has it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        return (
            x * torch.bernoulli(torch.full((len(x), *[1] * (x.dim() - 1)), 1 - self.drop_prob)) / (1 - self.drop_prob)
        )


class Marked(nn.Module):
    """Two branches with drop paths, the first with a mask and a layer scale, and a stem before them."""

    def __init__(self, rate: float = 0.0, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mlp = nn.Linear(width, width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))
        self.drop_path1 = DropPath(rate) if rate > 0.0 else nn.Identity()
        self.drop_path2 = DropPath(rate) if rate > 0.0 else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: bool = True) -> Tensor:
        x = self.stem(x)
        y = self.mix(self.norm1(x))
        if mask is not None:
            y = y * mask
        if scale:
            y = self.gamma * y
        x = x + self.drop_path1(y)
        return torch.relu(x + self.drop_path2(self.mlp(self.norm2(x))))


class Unmarked(nn.Module):
    """A residual block with nothing that marks its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def reference(block: Marked, x: Tensor, kept: tuple[bool, bool], mask: Tensor | None = None) -> Tensor:
    x = block.stem(x)
    if kept[0]:
        x = x + block.gamma * block.mix(block.norm1(x)) * (1 if mask is None else mask)
    return torch.relu(x + block.mlp(block.norm2(x)) if kept[1] else x)


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_paths_and_identities_in_their_place_mark_the_branches(rate: float) -> None:
    network = nn.Sequential(Marked(rate), Marked(rate)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    cf.apply_stochastic_depth(network, drop_rate=0.5, drop_unit="branch")
    block: Any = network[0]
    plan = block.drop_plan
    for kept in ((True, True), (False, True), (True, False), (False, False)):
        plan.decide([not kept[0], not kept[1], False, False])
        plan.open()
        assert torch.allclose(block(x), reference(block, x, kept), atol=1e-12)


def test_rows_and_further_arguments_of_a_traced_block() -> None:
    network = nn.Sequential(Marked()).double()
    cf.apply_stochastic_depth(network, stochastic_method="sample", drop_rate=0.5)
    block: Any = network[0]
    x, mask = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)
    dropped = torch.tensor([True, False, False, True])
    block.drop_plan.decide(dropped[None].numpy())
    block.drop_plan.open()
    for given in (mask, None):
        whole = reference(block, x, (True, True), given)
        none = reference(block, x, (False, False), given)
        assert torch.allclose(block(x, mask=given), torch.where(dropped[:, None], none, whole), atol=1e-12)


def test_traced_blocks_fold_copy_pickle_and_are_restored() -> None:
    network = nn.Sequential(Marked(0.2), Marked(0.2)).double()
    plain = copy.deepcopy(network)
    x = torch.randn(4, 6, dtype=torch.float64)
    cf.apply_stochastic_depth(network, drop_rate=0.5)
    network(x)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin.eval()(x), network.eval()(x))
    assert repr(cf.remove_stochastic_depth(copy.deepcopy(network))) == repr(plain)
    before = network.eval()(x)
    assert torch.allclose(cf.fold_stochastic_depth(network)(x), before, atol=1e-12)
    assert [vars(module).keys() for module in network.modules()] == [vars(module).keys() for module in plain.modules()]


def test_an_unmarked_class_is_traced_only_if_the_user_names_it() -> None:
    network = nn.Sequential(Unmarked(), Unmarked())
    with pytest.raises(ValueError, match="model must contain residual blocks"):
        cf.apply_stochastic_depth(network)
    for target in (Unmarked, "Unmarked"):
        twin = cf.apply_stochastic_depth(copy.deepcopy(network), target_layer_name=target)
        assert len(cf.stochastic_blocks(twin)) == 2


def test_own_rates_are_taken_over_and_masks_are_silent_until_removed() -> None:
    network = nn.Sequential(Marked(0.1), Marked(0.3))
    cf.apply_stochastic_depth(network)
    plan = cf.stochastic_blocks(network)[0].drop_plan
    assert (plan.rates, plan.scaling) == ([0.1, 0.3], "training")
    assert [block.drop_path1.drop_prob for block in network] == [0.0, 0.0]  # type: ignore[union-attr]
    cf.remove_stochastic_depth(network)
    assert [block.drop_path2.drop_prob for block in network] == [0.1, 0.3]  # type: ignore[union-attr]


def test_a_given_rate_replaces_the_models_own_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    network = nn.Sequential(Marked(0.3), Marked(0.3))
    cf.apply_stochastic_depth(network, drop_rate=0.2)
    plan = cf.stochastic_blocks(network)[0].drop_plan
    assert (plan.rates, plan.scaling) == ([0.1, 0.2], "evaluation")
    assert "drop rates up to 0.2 replace the model's own drop-path rates up to 0.3" in caplog.text


def test_a_branch_with_its_own_mask_is_dropped_at_one_rate_only() -> None:
    """Both masks together would drop it in 0.75 of the steps."""
    network = nn.Sequential(Marked(0.5))
    cf.apply_stochastic_depth(network, drop_rate=0.5, drop_unit="branch", drop_distribution="uniform")
    block: Any = network[0]
    x = torch.randn(1, 6)
    shortcut = block.stem(x)
    dropped = 0
    for _ in range(400):
        network(x)
        dropped += block.drop_plan.dropped_blocks[1]
        state = block.drop_plan.dropped_blocks
        expected = reference(block, x, (not state[0], not state[1]))
        assert torch.allclose(network[0].plain_class.forward(block, x), reference(block, x, (True, True)))
        assert expected.shape == shortcut.shape
    assert abs(dropped / 400 - 0.5) < 5 * 0.5 / 20


class OwnRates(Marked):
    """Branches with different rates."""

    def __init__(self) -> None:
        super().__init__(0.1)
        self.drop_path2 = DropPath(0.2)


def test_different_own_rates_need_branches_that_are_dropped_by_themselves() -> None:
    with pytest.raises(ValueError, match=r"must have the same drop-path rate .* got \[0.1, 0.2\]: drop_unit='branch'"):
        cf.apply_stochastic_depth(nn.Sequential(OwnRates()))
    network = cf.apply_stochastic_depth(nn.Sequential(OwnRates()), drop_unit="branch")
    assert cf.stochastic_blocks(network)[0].drop_plan.rates == [0.1, 0.2]
    with pytest.raises(ValueError, match="drop_distribution needs a drop_rate"):
        cf.apply_stochastic_depth(nn.Sequential(Marked(0.1)), drop_distribution="uniform")


class ReturnsTuple(Marked):
    """A block with a tuple as output."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return x + self.drop_path1(self.mix(x)), None


class Branching(Marked):
    """Control flow on values."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.drop_path1(self.mix(x)) if x.sum() > 0 else x


class BothSides(Marked):
    """Drop paths on both sides."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.drop_path2(self.mlp(x)) + self.drop_path1(self.mix(x))


class MixesRows(Marked):
    """Rows that are not samples."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.drop_path1(self.mix(x - x.mean(0)))


class InPlace(Marked):
    """A branch that changes its input."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        x = self.stem(x)
        return x + self.drop_path1(self.mix(x.mul_(2)))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ReturnsTuple, "ReturnsTuple: its forward returns a tuple, not a tensor"),
        (Branching, "Branching: its forward cannot be traced"),
        (BothSides, "BothSides: it has drop paths on both sides of an addition"),
    ],
)
def test_blocks_that_cannot_be_traced_are_refused_with_the_reason(cls: type[nn.Module], reason: str) -> None:
    network = nn.Sequential(cls())
    before = vars(network[0]).keys()
    with pytest.raises(ValueError, match=reason):
        cf.apply_stochastic_depth(network)
    assert vars(network[0]).keys() == before


def test_rows_that_are_not_samples_are_refused_at_the_first_forward() -> None:
    x = torch.randn(4, 6)
    cf.apply_stochastic_depth(nn.Sequential(MixesRows()), drop_rate=0.0)(x)  # whole blocks may mix rows
    network = cf.apply_stochastic_depth(nn.Sequential(MixesRows()), stochastic_method="sample", drop_rate=0.1)
    with pytest.raises(ValueError, match=r"model\.0 \(MixesRows\) cannot be computed for some samples only"):
        network(x)


def test_a_branch_that_changes_its_input_in_place_is_refused() -> None:
    network = cf.apply_stochastic_depth(nn.Sequential(InPlace()), drop_rate=0.1)
    with pytest.raises(ValueError, match=r"model\.0 \(InPlace\) must not change its input in place"):
        network(torch.randn(4, 6))


def test_unconverted_blocks_next_to_converted_ones_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    cf.apply_stochastic_depth(nn.Sequential(Marked(), ReturnsTuple()), drop_rate=0.1)
    assert "1 blocks are not converted: ReturnsTuple: its forward returns a tuple" in caplog.text


def test_the_algorithm_takes_the_same_targets() -> None:
    assert StochasticDepth(target_layer_name=Unmarked).target_layer_name is Unmarked
    with pytest.raises(ValueError, match="target_layer_name must be the name of a block type or a module class, got 3"):
        StochasticDepth(target_layer_name=3)  # type: ignore[arg-type]


class WithSize(Marked):
    """A layer that gets the size of its maps."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return x + self.drop_path1(self.mix(x.unflatten(1, size)).flatten(1, 2))


class WithScale(Marked):
    """A drop path with a layer after it, which is not the end of a branch."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.mix(self.drop_path1(x))


class SharedMask(Marked):
    """A drop path that masks two branches, of which one adds to another input."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        other = other + self.drop_path1(self.mix(x))
        return other + self.drop_path1(self.mlp(other))


def test_tuples_of_numbers_are_arguments_of_a_traced_block() -> None:
    network = cf.apply_stochastic_depth(nn.Sequential(WithSize()), stochastic_method="sample", drop_rate=0.5)
    block: Any = network[0]
    x = torch.randn(4, 6, 6)
    assert block.eval()(x, (2, 3)).shape == block.train()(x, (3, 2)).shape == x.shape


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (WithScale, "WithScale: its drop path drop_path1 is not at the end of the branch"),
        (SharedMask, "SharedMask: its drop path drop_path1 masks something else, too"),
    ],
)
def test_a_drop_path_that_ends_no_branch_is_refused(cls: type[nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cf.apply_stochastic_depth(nn.Sequential(cls()))
