"""One set of evaluation data with a name of its own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluation data and the metrics that are computed on it.

    .. code-block:: python

        eval_dataloader=[
            Evaluator(label="val", dataloader=validation),
            Evaluator(label="clean", dataloader=clean, metric_names=["MulticlassAccuracy"]),
        ]

    Results are logged as ``loss/val/total`` and ``metrics/val/MulticlassAccuracy``.

    Args:
        label: The name of the data, without a slash, and neither ``"train"`` nor ``"predict"``.
        dataloader: Yields the batches.
        metric_names: Regular expressions of which one must match the whole name of a metric of the model; None for
            all metrics.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If `label` is invalid.
    """

    label: str
    dataloader: Iterable[Any]
    metric_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise TypeError(f"label must be a name, got {self.label!r}")
        if not self.label or "/" in self.label or self.label in ("train", "predict"):
            raise ValueError(f'label must be a name without "/" other than "train" and "predict", got {self.label!r}')
        names = self.metric_names
        if names is not None and (isinstance(names, str) or not all(isinstance(name, str) for name in names)):
            raise TypeError(f"metric_names must be a list of names, got {names!r}")

    def select(self, names: Iterable[str]) -> list[str]:
        """Those names of metrics that `metric_names` selects.

        Raises:
            ValueError: If one of `metric_names` matches none of them.
        """
        names = list(names)
        if self.metric_names is None:
            return names
        for pattern in self.metric_names:
            if not any(re.fullmatch(pattern, name) for name in names):
                known = ", ".join(names) or "none"
                raise ValueError(
                    f"metric_names of {self.label!r} must be among those of the model, {known}, got {pattern!r}"
                )
        return [name for name in names if any(re.fullmatch(pattern, name) for pattern in self.metric_names)]
