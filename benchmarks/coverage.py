"""Counts which models of torchvision and timm stochastic depth converts, and writes docs/coverage.md.

    python benchmarks/coverage.py                # all models, on the meta device: about half an hour
    python benchmarks/coverage.py --match resnet # only names that contain this; prints and writes nothing

A model counts as converted completely if it has residual blocks and none that looks residual is left: no class that
has drop paths of its own or a name such as Block stays as it is, apart from blocks without a shortcut.
"""

import argparse
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import etude.functional as cf
from etude.algorithms.stochastic_depth.discovery import find_blocks
from etude.models import create_model

# Networks of torchvision without additive shortcuts.
NOT_RESIDUAL = ("alexnet", "densenet", "googlenet", "inception", "shufflenet", "squeezenet", "vgg")


@dataclass(frozen=True)
class Result:
    """What became of one model: ``complete``, ``partial``, ``none`` or ``not built``, and why."""

    name: str
    status: str
    reasons: tuple[str, ...] = ()


def convert(name: str, **options: Any) -> Result:
    """Build a model on the meta device and convert it."""
    try:
        with torch.device("meta"):
            model = create_model(name, **options)
    except Exception as error:  # of the library: an option that it does not take, or no support for meta tensors
        return Result(
            name, "not built", (f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",)
        )
    try:
        _, unconverted = find_blocks(model, None)
    except ValueError as error:
        return Result(name, "none", (str(error).partition("contains none")[2].lstrip("; ") or "no residual blocks",))
    reasons = tuple(sorted(set(unconverted.values())))
    cf.apply_stochastic_depth(model, drop_rate=0.1)
    return Result(name, "partial" if reasons else "complete", reasons)


def torchvision_models() -> list[str]:
    """The classification networks of torchvision with additive shortcuts."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith(NOT_RESIDUAL)]


def results_of(names: list[str], **options: Any) -> Iterator[Result]:
    """The result of each model, printed as it comes."""
    for name in names:
        result = convert(name, **options)
        print(f"{result.status:<10} {name} {'; '.join(result.reasons)[:150]}", flush=True)
        yield result


def as_markdown(groups: dict[str, list[Result]]) -> str:
    """The counts, and for what is not converted the models by reason."""
    lines = [
        "# Which models are converted",
        "",
        "Counted by `python benchmarks/coverage.py` on the meta device, with "
        f"torchvision {torchvision.__version__} and timm {timm.__version__}. *Complete* means that no block which "
        "looks residual is left as it is.",
        "",
        "| | models | complete | partly | not at all | not built |",
        "|---|---|---|---|---|---|",
    ]
    for title, results in groups.items():
        counts = Counter(result.status for result in results)
        share = f"{counts['complete']} ({counts['complete'] / len(results):.0%})"
        lines.append(
            f"| {title} | {len(results)} | {share} | {counts['partial']} | {counts['none']} | {counts['not built']} |"
        )
    for title, results in groups.items():
        models = defaultdict(list)
        for result in results:
            for reason in result.reasons:
                models[result.status, reason].append(result.name.removeprefix("timm:"))
        lines += ["", f"## {title}: what is not converted, and why", ""]
        for (status, reason), names in sorted(models.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            lines.append(f"- {len(names)} ({status}): {reason.replace('|', '/')} — {shown}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only models whose name contains this")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    timm_names = [f"timm:{name}" for name in timm.list_models() if arguments.match in name]
    groups = {
        "torchvision": list(results_of([name for name in torchvision_models() if arguments.match in name])),
        "timm": list(results_of(timm_names)),
        "timm, drop_path_rate=0.1": list(results_of(timm_names, drop_path_rate=0.1)),
    }
    text = as_markdown({title: results for title, results in groups.items() if results})
    if arguments.match:
        print(text)
    else:
        (Path(__file__).parent.parent / "docs" / "coverage.md").write_text(text)


if __name__ == "__main__":
    main()
