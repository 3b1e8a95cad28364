"""Sharded tensors in a checkpoint: every rank writes its own part, and any number of ranks reads them.

torch.distributed.checkpoint writes and reads the parts. The position of each part is kept as plain values in
the checkpoint itself; the pickled index of the library is never read, as loading a pickle can run code.
"""

import hashlib
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine import State
from .. import distributed
from ..torch_internals import storage_info
from .atomic import is_abandoned, owner
from .shard_index import check_index, make_index

_MARK = "sharded tensor"
_MAY_HOLD_SHARDS = ("model", "optimizers", "algorithms", "callbacks")
_FILE_NAME = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
_FOLDER_NAME = re.compile(r"([^/\0]+)\.([0-9a-f]{16})\.([0-9]{1,9})\.[0-9a-f]{8}\.shards")


def is_sharded(tensor: Any) -> bool:
    """Whether each rank holds only a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def write_shards(contents: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write the sharded tensors of a checkpoint beside it. All ranks must call it together.

    Args:
        contents: The contents of the checkpoint.
        path: Where the checkpoint itself will be written, as the last step.

    Returns:
        The contents with marks in the place of the sharded tensors, and under ``"shards"`` where they are;
        the same contents if there are none.
    """
    tensors: dict[str, Tensor] = {}
    marked = {**contents, **{name: _marked(contents[name], name, tensors) for name in _MAY_HOLD_SHARDS}}
    if not tensors:
        return contents
    from torch.distributed.checkpoint.api import CheckpointException

    dcp = _library()

    own_name = f"{path.name}.{owner()}.{secrets.token_hex(4)}.shards"
    folder = path.with_name(distributed.from_rank_zero(own_name))
    try:
        metadata = dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        shutil.rmtree(folder, ignore_errors=True)
        failed = [wrapped for wrapped, _ in error.failures.values() if isinstance(wrapped, OSError)]
        raise failed[0] if failed else OSError(f"the shards of {path} could not be written: {error}") from error
    with distributed.all_or_none():
        own = {file.name: _digest(file) for file in folder.glob(f"__{distributed.rank()}_*.distcp")}
    digests = {name: digest for files in distributed.gather(own) for name, digest in files.items()}
    return {**marked, "shards": {"folder": folder.name, "files": digests, "tensors": make_index(metadata)}}


def without_shards(value: Any) -> Any:
    """The same nest of values with plain ones in the place of the sharded tensors."""
    return _marked(value, "", {})


def check_shards(contents: Mapping[str, Any], folder: Path) -> None:
    """Compare the files of the sharded tensors with what the checkpoint says of them.

    Raises:
        ValueError: If one is missing, was changed, or has a name that could lead elsewhere, or if the index does not
            hold every part of each tensor once.
    """
    shards = contents.get("shards")
    if shards is None:
        return
    if not _FOLDER_NAME.fullmatch(shards["folder"]) or not all(map(_FILE_NAME.fullmatch, shards["files"])):
        raise ValueError("the names of its shards must be those that the Trainer gives")
    file_sizes = {}
    for name, digest in shards["files"].items():
        file = folder / shards["folder"] / name
        if not file.is_file() or file.is_symlink() or _digest(file) != digest:
            raise ValueError(f"its shard {shards['folder']}/{name} is missing or was changed")
        file_sizes[name] = file.stat().st_size
    check_index(shards["tensors"], file_sizes)


def fit_to(contents: Mapping[str, Any], state: State, folder: Path) -> dict[str, Any]:
    """Give the tensors of a checkpoint the sharding that they have in a run.

    Args:
        contents: The contents of a checkpoint.
        state: The run.
        folder: The folder of the checkpoint.

    Returns:
        The contents with a tensor in the place of every mark.
    """
    templates: dict[str, Tensor] = {}
    model = state.model.state_dict()
    places = (contents.get("shards") or {"tensors": {}})["tensors"]
    fitted = dict(contents)
    fitted["model"] = {name: _like(value, model.get(name), templates) for name, value in contents["model"].items()}
    fitted["optimizers"] = [
        {**saved, "state": _fit_optimizer(saved["state"], optimizer, templates)}
        for saved, optimizer in zip(contents["optimizers"], state.optimizers, strict=False)  # compared later
    ]
    for name, things in (("algorithms", state.algorithms), ("callbacks", state.callbacks)):
        # The shards of callbacks that are no longer in the run are not read.
        own = {id(saved): thing.state_dict() for saved, thing in matched(contents[name], things)}
        fitted[name] = [
            {**saved, "state": _fit_state(saved["state"], own[id(saved)], model, places, templates)}
            if id(saved) in own
            else saved
            for saved in contents[name]
        ]
    _load(contents, folder, templates, alone=distributed.world_size() == 1)
    return fitted


def matched(saved: Sequence[Mapping[str, Any]], things: Sequence[Any]) -> list[tuple[Mapping[str, Any], Any]]:
    """Saved states and the algorithms or callbacks of the same class name, in order; others are skipped."""
    states: dict[str, list[Mapping[str, Any]]] = {}
    for item in saved:
        states.setdefault(item["name"], []).append(item)
    return [(states[name].pop(0), thing) for thing in things if states.get(name := type(thing).__name__)]


def whole_tensors(tensors: Mapping[str, Any], contents: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, such as its weights, unsharded: assembled by one process.

    Args:
        tensors: By name, with marks in the place of those that lie in shards.
        contents: Of the checkpoint.
        folder: The folder of the checkpoint.
    """
    templates: dict[str, Tensor] = {}
    weights = {}
    for name, value in tensors.items():
        if _is_mark(value):
            place = contents["shards"]["tensors"][value[1]]
            templates[value[1]] = torch.empty(place["size"], dtype=place["dtype"])
            value = templates[value[1]]
        weights[name] = value
    _load(contents, folder, templates, alone=True)
    return weights


def remove_shards(path: Path, *, keep: str | None = None) -> None:
    """Remove the folders of shards that belong to a checkpoint.

    Args:
        path: The path of the checkpoint.
        keep: Name of a folder that is not removed.
    """
    for folder in list(path.parent.iterdir()):
        match = _FOLDER_NAME.fullmatch(folder.name)
        if match and match[1] == path.name and folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unused_shards(folder: Path) -> None:
    """Remove the shards of checkpoints that a killed process did not finish.

    Another machine may be writing shards into the folder now: those are removed only when nothing was written for a
    day.
    """
    for shards in list(folder.iterdir()):
        match = _FOLDER_NAME.fullmatch(shards.name)
        if match is None or (folder / match[1]).exists():
            continue
        if is_abandoned([shards, *shards.glob("*")], machine=match[2], pid=int(match[3])):
            shutil.rmtree(shards, ignore_errors=True)


def _marked(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """The same nest with marks for the sharded tensors, which are put into `tensors` by name."""
    if is_sharded(value):
        tensors[key] = value
        return _MARK, key
    if isinstance(value, dict):
        return {name: _marked(item, f"{key}/{name}", tensors) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_marked(item, f"{key}/{number}", tensors) for number, item in enumerate(value))
    return value


def _is_mark(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] == _MARK


def _like(value: Any, own: Any, templates: dict[str, Tensor]) -> Any:
    """A saved value in the form of the run's own tensor; what lies in shards gets its values later."""
    if _is_mark(value):
        if not isinstance(own, Tensor):
            raise ValueError(f"the checkpoint must fit the model, which has nothing for {value[1]!r}")
        templates[value[1]] = template = torch.empty_like(own.detach())
        return template
    if isinstance(value, Tensor) and is_sharded(own) and value.shape == own.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return value


def _fit_state(
    value: Any,
    own: Any,
    model: Mapping[str, Any],
    places: Mapping[str, Any],
    templates: dict[str, Tensor],
    name: Any = "",
) -> Any:
    """The saved state of an algorithm or callback, sharded like its own tensors, or else like those of the model.

    Args:
        value: What was saved, or a part of it.
        own: The same part of the state in the run; None if there is none yet.
        model: The ``state_dict`` of the model.
        places: Where each tensor lies in the shards.
        templates: Gets the tensors that are still to be loaded.
        name: Key of `value` in the dictionary that holds it.
    """
    if _is_mark(value):
        key, place = value[1], places[value[1]]
        like = _first_of_shape(place["size"], own, model.get(name))
        dtype = place["dtype"]
        templates[key] = (
            torch.empty(place["size"], dtype=dtype) if like is None else torch.empty_like(like.detach(), dtype=dtype)
        )
        return templates[key]
    if isinstance(value, Tensor):
        return _like(value, _first_of_shape(value.shape, own, model.get(name)), templates)
    if isinstance(value, dict):
        by_key = own if isinstance(own, Mapping) else {}
        return {key: _fit_state(item, by_key.get(key), model, places, templates, key) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        owned = list(own) if isinstance(own, (list, tuple)) and len(own) == len(value) else [None] * len(value)
        return type(value)(
            _fit_state(item, other, model, places, templates, name) for item, other in zip(value, owned, strict=True)
        )
    return value


def _first_of_shape(shape: Sequence[int], *candidates: Any) -> Tensor | None:
    alike = (item for item in candidates if isinstance(item, Tensor) and item.shape == torch.Size(shape))
    return next(alike, None)


def _fit_optimizer(saved: Any, optimizer: Any, templates: dict[str, Tensor]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        **saved,
        "state": {
            number: {name: _like(value, parameters[number], templates) for name, value in values.items()}
            if number in range(len(parameters))  # any other is refused later, by name
            else values
            for number, values in saved["state"].items()
        },
    }


def _load(contents: Mapping[str, Any], folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill tensors, whole or sharded, from the shards. All ranks must call it together unless `alone`."""
    if not tensors:
        return
    from torch.distributed.checkpoint.api import CheckpointException

    dcp = _library()

    reader = _reader(folder / contents["shards"]["folder"], contents["shards"])
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as `alone` requests
            dcp.load(tensors, storage_reader=reader, planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise ValueError(f"the shards of the checkpoint do not fit the run: {error}") from error


def _reader(folder: Path, shards: Mapping[str, Any]) -> Any:
    """Reads shards by the index in the checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    stored = {}
    for name, place in shards["tensors"].items():
        chunks = []
        for begin, size, file, offset, length in place["parts"]:
            chunks.append(ChunkStorageMetadata(torch.Size(begin), torch.Size(size)))
            stored[MetadataIndex(name, begin)] = storage_info(file, offset, length)
        properties = TensorProperties(dtype=place["dtype"])
        tensors[name] = TensorStorageMetadata(properties, torch.Size(place["size"]), chunks)

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return Metadata(tensors, storage_data=stored, storage_meta=StorageMeta(load_id=self.load_id))

    return Reader(folder)


def _library() -> Any:
    """torch.distributed.checkpoint, imported on use; its type stubs are incomplete."""
    import torch.distributed.checkpoint

    return torch.distributed.checkpoint


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
