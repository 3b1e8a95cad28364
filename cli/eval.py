"""``etude eval``: how well the network of a run classifies, per class too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .packages import check_packages

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from .trained import Trained


def evaluate(
    run: str,
    data: str | None = None,
    checkpoint: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | None = None,
    output: str | None = None,
) -> None:
    """Evaluate the network of a finished run, on its own evaluation images or on other ones of the same classes.

    Prints top-1 and top-5 accuracy, the loss, and the accuracy of each class, and writes them to eval.json and the
    confusion matrix to confusion.png.

    Args:
        run: The folder of the run, such as runs/resnet50-20260101-120000.
        data: A folder of images with one folder per class, all of which are evaluated, or the part val/ where there
            is one; by default the evaluation images of the run.
        checkpoint: best, latest, or the file of a checkpoint of the run, to evaluate instead of its final weights.
        batch_size: Images per batch.
        num_workers: Processes that load the images.
        device: cpu, gpu or a torch device; by default the GPU where there is one.
        output: The folder for eval.json and confusion.png; by default that of the run.
    """
    check_packages("eval", "matplotlib")
    from .picture import draw_confusion
    from .trained import load_trained

    folder = Path(run)
    trained = load_trained(folder)
    if checkpoint is not None:
        trained = trained.with_weights_of(folder, checkpoint)
    target = Path(output) if output is not None else folder
    if not target.is_dir():
        raise NotADirectoryError(f"output must be an existing folder, got {output!r}")
    results, confusion = measure(trained, _dataloader(trained, folder, data, batch_size, num_workers), device)
    (target / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    draw_confusion(confusion, trained.recorded.class_names, target / "confusion.png")
    print(as_table(results))
    print(f"\n{target / 'eval.json'}, {target / 'confusion.png'}")


def measure(
    trained: Trained, dataloader: DataLoader[Any], device: str | None
) -> tuple[dict[str, Any], list[list[int]]]:
    """The results of an evaluation by name, and the confusion matrix."""
    from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

    from ..models import ComposerClassifier
    from ..trainer import Trainer

    names = trained.recorded.class_names
    count = len(names)
    metrics: dict[str, Any] = {
        "top1": MulticlassAccuracy(count, average="micro"),
        "confusion": MulticlassConfusionMatrix(count),
    }
    if count > 5:
        metrics["top5"] = MulticlassAccuracy(count, top_k=5, average="micro")
    classifier = ComposerClassifier(trained.network, count, val_metrics=metrics)
    trainer = Trainer(classifier, eval_dataloader=dataloader, device=device)
    found: dict[str, Any] = trainer.eval()
    trainer.close()
    confusion: list[list[int]] = found["metrics/eval/confusion"].tolist()
    per_class = {
        name: {"images": sum(row), "accuracy": row[number] / sum(row) if sum(row) else None}
        for number, (name, row) in enumerate(zip(names, confusion, strict=True))
    }
    results = {
        "images": sum(map(sum, confusion)),
        "top1": found["metrics/eval/top1"],
        "top5": found.get("metrics/eval/top5"),
        "loss": found["loss/eval/total"],
        "per_class": per_class,
        "confusion": confusion,
    }
    return results, confusion


def as_table(results: dict[str, Any]) -> str:
    """The results as lines of aligned text."""
    lines = [f"{results['images']} images", f"top-1 accuracy  {results['top1']:.2%}"]
    if results["top5"] is not None:
        lines.append(f"top-5 accuracy  {results['top5']:.2%}")
    lines += [f"loss            {results['loss']:.4f}", ""]
    width = max(5, *map(len, results["per_class"]))
    lines.append(f"{'class':<{width}}  {'images':>7}  {'accuracy':>8}")
    for name, found in results["per_class"].items():
        accuracy = "" if found["accuracy"] is None else f"{found['accuracy']:.2%}"
        lines.append(f"{name:<{width}}  {found['images']:>7}  {accuracy:>8}")
    return "\n".join(lines)


def _dataloader(trained: Trained, folder: Path, data: str | None, batch_size: int, num_workers: int) -> DataLoader[Any]:
    from dataclasses import replace

    from ..datasets import labelled_images_dataloader
    from .data import load_data, read_source
    from .recipe import read_options
    from .start import RECIPE

    recorded = trained.recorded
    if data is not None and read_source(data).kind == "folder":
        return labelled_images_dataloader(
            data, recorded.class_names, trained.transform, batch_size=batch_size, num_workers=num_workers
        )
    if not (folder / RECIPE).is_file():
        raise FileNotFoundError(f"data must be given, as {folder} has no {RECIPE} that names the run's own")
    options = replace(read_options(folder / RECIPE).data, num_workers=num_workers)
    if data is not None:
        options = replace(options, data=data)
    loaded = load_data(options, batch_size)
    if loaded.class_names != recorded.class_names:
        raise ValueError(f"data must have the classes of the run, {recorded.class_names[0]} and so on, got others")
    return loaded.eval_dataloader
