"""Counts which models of torchvision and timm stochastic depth converts, and writes docs/coverage.md.

    python benchmarks/coverage.py                       # all models, on the meta device, in one process
    python benchmarks/coverage.py --results FILE.jsonl  # the same; run again after an interruption, it continues
    python benchmarks/coverage.py --match resnet        # only names that contain this; prints the page

timm's models are counted twice: with their default arguments, and with ``drop_path_rate=0.1``. A model counts as
*complete* if it has residual blocks, all of them are converted and no block that looks residual is left: no class that
has drop paths of its own or a name such as Block stays as it is, apart from blocks without a shortcut.
"""

import argparse
import json
import logging
import signal
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

import etude.functional as cf
from etude.algorithms.stochastic_depth.discovery import search_blocks
from etude.models import create_model

# Networks of torchvision without additive shortcuts.
NOT_RESIDUAL = ("alexnet", "densenet", "googlenet", "inception", "shufflenet", "squeezenet", "vgg")
GROUPS: dict[str, dict[str, Any]] = {
    "torchvision": {},
    "timm": {},
    "timm, drop_path_rate=0.1": {"drop_path_rate": 0.1},
}


@dataclass(frozen=True)
class Result:
    """What became of one model: its status is ``complete``, ``partly``, ``no`` or ``not built``."""

    group: str
    family: str
    name: str
    status: str
    reasons: tuple[str, ...] = ()


def models_by_family(group: str) -> Iterator[tuple[str, str]]:
    """The names of a group's models, each after the module that defines it."""
    if group == "torchvision":
        for name in torchvision.models.list_models(module=torchvision.models):
            if not name.startswith(NOT_RESIDUAL):
                yield torchvision.models.get_model_builder(name).__module__.rpartition(".")[2], name
    else:
        for module in timm.list_modules():
            for name in timm.list_models(module=module):
                yield module, name


def outcome(name: str, **options: Any) -> tuple[str, tuple[str, ...]]:
    """Build a model on the meta device and convert it: the status, and why it is not complete."""
    try:
        with torch.device("meta"):
            model = create_model(name, **options)
    except TypeError as error:
        if not any(option in str(error) for option in options):
            raise
        return "not built", (f"its constructor takes no {', '.join(options)}",)
    found, unconverted = search_blocks(model)
    reasons = tuple(sorted(set(unconverted.values())))
    if not found:
        return "no", reasons or ("no class is known, has a drop path, or a name like Block and a shortcut",)
    cf.apply_stochastic_depth(model, drop_rate=0.1)
    return ("partly" if reasons else "complete"), reasons


def count(match: str, results_file: Path | None, seconds: int) -> list[Result]:
    """The results of all models; those that the file has already are not counted again."""
    results: dict[tuple[str, str], Result] = {}
    if results_file is not None and results_file.exists():
        for record in map(json.loads, results_file.read_text().splitlines()):
            results[record["group"], record["name"]] = Result(**{**record, "reasons": tuple(record["reasons"])})
    signal.signal(signal.SIGALRM, _give_up)
    for group, options in GROUPS.items():
        for family, name in models_by_family(group):
            if match not in name or (group, name) in results:
                continue
            signal.alarm(seconds)
            try:
                status, reasons = outcome(name if group == "torchvision" else f"timm:{name}", **options)
            except TimeoutError:
                status, reasons = "not built", (f"took more than {seconds} s",)
            finally:
                signal.alarm(0)
            results[group, name] = result = Result(group, family, name, status, reasons)
            print(f"{group}: {status:<9} {name} {'; '.join(reasons)[:150]}", flush=True)
            if results_file is not None:
                with results_file.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
    return [result for result in results.values() if match in result.name]


def _give_up(*arguments: Any) -> None:
    raise TimeoutError


def as_markdown(results: Sequence[Result]) -> str:
    """The counts in all and by family, and the models that are not complete by family and reason."""
    by_group = {group: [one for one in results if one.group == group] for group in GROUPS}
    lines = [
        "# Which models are converted",
        "",
        "Printed by `python benchmarks/coverage.py`, which builds every model on the meta device, with "
        f"torchvision {torchvision.__version__} and timm {timm.__version__}. *Complete* means that all residual blocks "
        "are converted and no block that looks residual is left as it is. Networks of torchvision without additive "
        f"shortcuts are not counted ({', '.join(NOT_RESIDUAL)}); those of timm are. No forward is run: what only the "
        "data show, such as rows that are not samples (MobileViT with the sample method), is refused at the first one.",
        "",
        "| | models | complete | partly | no | not built |",
        "|---|---|---|---|---|---|",
    ]
    for group, members in by_group.items():
        counts = Counter(one.status for one in members)
        share = f"{counts['complete']} ({counts['complete'] / max(len(members), 1):.1%})"
        lines.append(
            f"| {group} | {len(members)} | {share} | {counts['partly']} | {counts['no']} | {counts['not built']} |"
        )
    for group, members in by_group.items():
        lines += ["", f"## {group}", "", *_families(members)]
    return "\n".join(lines) + "\n"


def _families(members: Sequence[Result]) -> Iterator[str]:
    families: dict[str, list[Result]] = defaultdict(list)
    for one in members:
        families[one.family].append(one)
    complete = [family for family, ones in families.items() if all(one.status == "complete" for one in ones)]
    not_built = [family for family, ones in families.items() if all(one.status == "not built" for one in ones)]
    yield "Complete: " + ", ".join(f"{family} {len(families[family])}" for family in complete) + "."
    if not_built:
        reasons = sorted({reason for family in not_built for one in families[family] for reason in one.reasons})
        named = ", ".join(f"{family} {len(families[family])}" for family in not_built)
        yield from ("", f"Not built ({'; '.join(reasons)}): {named}.")
    rest = [family for family in families if family not in (*complete, *not_built)]
    if rest:
        yield from ("", "| family | complete | what is left | why | models |", "|---|---|---|---|---|")
    for family in rest:
        num_complete = sum(one.status == "complete" for one in families[family])
        whys: dict[tuple[str, str], list[str]] = defaultdict(list)
        for one in families[family]:
            if one.status != "complete":
                whys[one.status, "; ".join(one.reasons)].append(one.name)
        for (status, why), names in whys.items():
            what = {"no": "all", "partly": "some blocks", "not built": "not built"}[status]
            shown = "all" if len(names) == len(families[family]) else ", ".join(names)
            complete_of_all = f"{num_complete} of {len(families[family])}"
            yield f"| {family} | {complete_of_all} | {what} | {why.replace('|', '/')} | {shown} |"


def main() -> None:
    """Count, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="", help="only models whose name contains this; prints the page")
    parser.add_argument("--results", type=Path, help="a JSON Lines file of results, read and appended to")
    parser.add_argument("--seconds", type=int, default=300, help="the most time that one model may take")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    text = as_markdown(count(arguments.match, arguments.results, arguments.seconds))
    if arguments.match:
        print(text)
    else:
        (Path(__file__).parent.parent / "docs" / "coverage.md").write_text(text)


if __name__ == "__main__":
    main()
