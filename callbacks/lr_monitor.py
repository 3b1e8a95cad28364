"""Logs the learning rates."""

from torch import Tensor

from ..engine import Callback, Logger, State


class LRMonitor(Callback):
    """Logs the learning rate of every parameter group, as it is used in the step.

    The metric is ``lr-SGD/group0`` for the first group of an SGD optimizer. Of several optimizers of one class the
    second is ``lr-SGD1/group0``, and so on.
    """

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Log them, before the optimizers step."""
        rates: dict[str, float | Tensor] = {}
        names: list[str] = []
        for optimizer in state.optimizers:
            name = type(optimizer).__name__
            number = names.count(name) or ""
            names.append(name)
            for index, group in enumerate(optimizer.param_groups):
                lr = group["lr"]
                # a schedule changes a tensor in place
                rates[f"lr-{name}{number}/group{index}"] = lr.clone() if isinstance(lr, Tensor) else lr
        logger.log_metrics(rates)
