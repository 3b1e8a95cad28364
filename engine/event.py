"""The moments of a training run at which algorithms and callbacks may act."""

from enum import Enum


class Event(str, Enum):
    """One moment of the training or evaluation loop.

    The loop, with every event where it happens (``Trainer.fit`` does exactly this; a test executes
    this text and compares):

    .. code-block:: python

        # <INIT>                            once, on the raw model, when the Trainer is built
        # <BEFORE_LOAD>
        if there_is_a_checkpoint:
            load_checkpoint()
        # <AFTER_LOAD>
        # <FIT_START>
        for epoch in epochs:
            # <EPOCH_START>
            while True:
                # <BEFORE_DATALOADER>
                batch = next_batch()
                if batch is None:           # the dataloader is exhausted
                    break
                # <AFTER_DATALOADER>
                # <BATCH_START>
                # <BEFORE_TRAIN_BATCH>
                for microbatch in split(batch):
                    # <BEFORE_FORWARD>
                    outputs = model(microbatch)
                    # <AFTER_FORWARD>
                    # <BEFORE_LOSS>
                    loss = model.loss(outputs, microbatch)
                    # <AFTER_LOSS>
                    # <BEFORE_BACKWARD>
                    loss.backward()
                    # <AFTER_BACKWARD>
                # <AFTER_TRAIN_BATCH>       the gradients are complete
                optimizer.step()            # and the timestamp moves on
                # <BATCH_END>
                if evaluation_is_due(batch):
                    evaluate()
                # <BATCH_CHECKPOINT>
            # <EPOCH_END>
            if evaluation_is_due(epoch):
                evaluate()
            # <EPOCH_CHECKPOINT>
        # <FIT_END>

    A run that resumes in the middle of an epoch continues there: EPOCH_START is not run again.

    Evaluation, inside the loop above or by ``Trainer.eval`` (only the latter is *standalone*):

    .. code-block:: python

        if standalone:
            # <EVAL_STANDALONE_START>
        # <EVAL_BEFORE_ALL>
        for evaluator in evaluators:
            # <EVAL_START>
            while True:
                # <EVAL_BEFORE_DATALOADER>
                batch = next_batch()
                if batch is None:
                    break
                # <EVAL_AFTER_DATALOADER>
                # <EVAL_BATCH_START>
                # <EVAL_BEFORE_FORWARD>
                outputs = model(batch)
                # <EVAL_AFTER_FORWARD>
                # <EVAL_BATCH_END>
            # <EVAL_END>
        # <EVAL_AFTER_ALL>
        if standalone:
            # <EVAL_STANDALONE_END>

    Prediction, by ``Trainer.predict``:

    .. code-block:: python

        # <PREDICT_START>
        for batch in dataloader:
            # <PREDICT_BATCH_START>
            # <PREDICT_BEFORE_FORWARD>
            outputs = model(batch)
            # <PREDICT_AFTER_FORWARD>
            # <PREDICT_BATCH_END>
        # <PREDICT_END>

    Algorithms run in the order in which they were given, and in the reverse order at the events that end what
    another event began, so that each one can undo there what it did before (first in, last out). Reversed are:

    - AFTER_LOAD, AFTER_DATALOADER, AFTER_FORWARD, AFTER_LOSS, AFTER_BACKWARD, AFTER_TRAIN_BATCH,
    - BATCH_END, EPOCH_END, FIT_END,
    - EVAL_AFTER_DATALOADER, EVAL_AFTER_FORWARD, EVAL_BATCH_END, EVAL_END, EVAL_AFTER_ALL, EVAL_STANDALONE_END,
    - PREDICT_AFTER_FORWARD, PREDICT_BATCH_END, PREDICT_END.

    Callbacks always run in their order. The value of an event is the name of the :class:`Callback` method that
    it calls.
    """

    __hash__ = str.__hash__  # that of Enum is a function in Python, which costs more than all else at an event

    INIT = "init"
    BEFORE_LOAD = "before_load"
    AFTER_LOAD = "after_load"
    FIT_START = "fit_start"
    EPOCH_START = "epoch_start"
    BEFORE_DATALOADER = "before_dataloader"
    AFTER_DATALOADER = "after_dataloader"
    BATCH_START = "batch_start"
    BEFORE_TRAIN_BATCH = "before_train_batch"
    BEFORE_FORWARD = "before_forward"
    AFTER_FORWARD = "after_forward"
    BEFORE_LOSS = "before_loss"
    AFTER_LOSS = "after_loss"
    BEFORE_BACKWARD = "before_backward"
    AFTER_BACKWARD = "after_backward"
    AFTER_TRAIN_BATCH = "after_train_batch"
    BATCH_END = "batch_end"
    BATCH_CHECKPOINT = "batch_checkpoint"
    EPOCH_END = "epoch_end"
    EPOCH_CHECKPOINT = "epoch_checkpoint"
    FIT_END = "fit_end"

    EVAL_STANDALONE_START = "eval_standalone_start"
    EVAL_BEFORE_ALL = "eval_before_all"
    EVAL_START = "eval_start"
    EVAL_BEFORE_DATALOADER = "eval_before_dataloader"
    EVAL_AFTER_DATALOADER = "eval_after_dataloader"
    EVAL_BATCH_START = "eval_batch_start"
    EVAL_BEFORE_FORWARD = "eval_before_forward"
    EVAL_AFTER_FORWARD = "eval_after_forward"
    EVAL_BATCH_END = "eval_batch_end"
    EVAL_END = "eval_end"
    EVAL_AFTER_ALL = "eval_after_all"
    EVAL_STANDALONE_END = "eval_standalone_end"

    PREDICT_START = "predict_start"
    PREDICT_BATCH_START = "predict_batch_start"
    PREDICT_BEFORE_FORWARD = "predict_before_forward"
    PREDICT_AFTER_FORWARD = "predict_after_forward"
    PREDICT_BATCH_END = "predict_batch_end"
    PREDICT_END = "predict_end"
