"""The progress of a run: what changes from step to step, besides the model, optimizers and schedulers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from torch import Tensor

from .checks import check_int
from .epoch_loss import EpochLoss
from .timestamp import Timestamp

_MOST = 2**63 - 1


@dataclass(kw_only=True)
class Progress:
    """The progress of a run. `State` is a subclass; checkpoints save and restore it.

    Args:
        timestamp: What is finished.
        eval_metrics: Results of the latest evaluation that are numbers, by name.
        eval_tensors: Results with more than one element, such as confusion matrices, on the CPU.
        evaluated_at: Number of batches that were finished at the latest evaluation, -1 before the first.
        num_nonfinite_steps: How many steps in a row were skipped because loss or gradients were not finite; up to
            the latest step after `State.settle`.
        device_train_microbatch_size: Rows per forward and backward pass, which running out of memory may reduce;
            None for the whole batch.
        epoch_loss: The mean loss of the current epoch of training.
    """

    timestamp: Timestamp = field(default_factory=Timestamp)
    eval_metrics: dict[str, float] = field(default_factory=dict)
    eval_tensors: dict[str, Tensor] = field(default_factory=dict)
    evaluated_at: int = -1
    num_nonfinite_steps: int = 0
    device_train_microbatch_size: int | None = None
    epoch_loss: EpochLoss = field(default_factory=EpochLoss, repr=False, compare=False)

    def state_dict(self) -> dict[str, Any]:
        """The progress as plain values."""
        return {
            "timestamp": self.timestamp.state_dict(),
            "eval_metrics": dict(self.eval_metrics),
            "eval_tensors": dict(self.eval_tensors),
            "evaluated_at": self.evaluated_at,
            "num_nonfinite_steps": self.num_nonfinite_steps,
            "device_train_microbatch_size": self.device_train_microbatch_size,
            "epoch_loss": list(self.epoch_loss.sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            TypeError: If a value has the wrong type.
            ValueError: If the values are inconsistent. Nothing is changed then.
        """
        timestamp = _checked_timestamp(state["timestamp"])
        eval_metrics = {str(name): float(value) for name, value in state["eval_metrics"].items()}
        eval_tensors = {str(name): value for name, value in state["eval_tensors"].items()}
        if unknown := [name for name, value in eval_tensors.items() if not isinstance(value, Tensor)]:
            raise ValueError(f"eval_tensors must hold tensors, got {eval_tensors[unknown[0]]!r:.100}")
        batch = int(timestamp.batch)
        evaluated_at = check_int("evaluated_at", state["evaluated_at"], ge=-1, le=batch)
        num_nonfinite_steps = check_int("num_nonfinite_steps", state["num_nonfinite_steps"], ge=0, le=batch)
        size = state["device_train_microbatch_size"]
        if size is not None:
            check_int("device_train_microbatch_size", size, ge=1, le=_MOST)
        total, count = state["epoch_loss"]
        if type(total) is not float or type(count) is not float or not 0 <= count <= _MOST or not isfinite(total):
            raise ValueError(
                f"epoch_loss must be a sum of losses and a number of samples, got {total!r}, {count!r:.100}"
            )
        self.epoch_loss.sums = total, count
        self.timestamp, self.evaluated_at = timestamp, evaluated_at
        self.eval_metrics, self.eval_tensors = eval_metrics, eval_tensors
        self.num_nonfinite_steps, self.device_train_microbatch_size = num_nonfinite_steps, size


def _checked_timestamp(saved: Mapping[str, Any]) -> Timestamp:
    counts = {name: check_int(name, saved[name], ge=0, le=_MOST) for name in Timestamp().state_dict()}
    for part, whole in (("batch_in_epoch", "batch"), ("sample_in_epoch", "sample"), ("epoch", "batch")):
        check_int(part, counts[part], le=counts[whole])
    return Timestamp.from_state_dict(counts)
