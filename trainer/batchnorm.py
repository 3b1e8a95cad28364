"""BatchNorm over the rows of all ranks."""

from torch import nn

from ..engine import State


def convert_batchnorm(state: State) -> None:
    """Make the BatchNorm layers of the model see the rows of all ranks.

    Raises:
        ValueError: If there is no BatchNorm, torch cannot do it on this device, or a rank may leave out
            a layer that another one computes and waits in.
    """
    if state.device.type != "cuda":
        raise ValueError(f"sync_batchnorm needs GPUs, where torch has SyncBatchNorm, got device {state.device}")
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in state.model.modules()):
        raise ValueError(f"sync_batchnorm needs a model with BatchNorm to have an effect, got {state.model!r}")
    if any(algorithm.ranks_may_differ for algorithm in state.algorithms):
        raise ValueError(
            "sync_batchnorm needs all ranks to compute the same layers; stochastic_method='sample' and "
            "use_same_gpu_seed=False let them differ"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(state.model)
