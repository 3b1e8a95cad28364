"""Prediction: the outputs of the model for all batches of a dataloader."""

from typing import Any

import torch

from ..engine import Engine, Event
from . import distributed
from .data import batches
from .data.reader import EpochReader
from .distributed.parallelism import reshard
from .evaluation import evaluation_mode
from .precision import Precision, autocast


def predict(engine: Engine, reader: EpochReader, precision: Precision) -> list[Any]:
    """Run the model in evaluation mode on every batch, with the PREDICT events.

    Args:
        engine: Runs the events.
        reader: Reads the batches.
        precision: Dtype of the forward pass.

    Returns:
        The outputs of each batch on the CPU, in the order of the dataloader. Each rank gets the rows of all ranks.

    Raises:
        ValueError: If there is no batch.
    """
    state, run_event = engine.state, engine.run_event
    before = state.batch, state.batch_num_samples, state.global_batch_num_samples, state.dataloader_label
    distributed.copy_from_rank_zero(state.model.buffers())  # BatchNorm statistics differ between ranks
    state.dataloader_label = "predict"
    outputs = []
    with evaluation_mode(state.model), torch.no_grad():
        run_event(Event.PREDICT_START)
        for _ in batches.read_batches(engine, reader):
            run_event(Event.PREDICT_BATCH_START)
            with autocast(precision, state.device):
                run_event(Event.PREDICT_BEFORE_FORWARD)
                state.outputs = state.model(state.batch)
                run_event(Event.PREDICT_AFTER_FORWARD)
            shares = distributed.gather(batches.move(state.outputs, torch.device("cpu")))
            outputs.append(shares[0] if len(shares) == 1 else batches.concatenate(shares))
            run_event(Event.PREDICT_BATCH_END)
        if not outputs:
            raise ValueError("dataloader must yield at least one batch, it yielded none")
        reshard(state.model)  # as an evaluation does
        run_event(Event.PREDICT_END)
    state.batch, state.batch_num_samples, state.global_batch_num_samples, state.dataloader_label = before
    return outputs
