"""Random numbers that depend only on the seed of the run and the step."""

import numpy as np


def step_generator(seed: int, step: int, rank: int = 0, *, stream: int) -> np.random.Generator:
    """A generator that depends only on its arguments; no global generator is read or advanced.

    What is drawn from it is the same when a step is repeated or a run resumed.

    Args:
        seed: The seed of the run.
        step: The number of the optimizer step, from 0.
        rank: The rank where each draws for itself, and otherwise 0.
        stream: Separates the draws of one step: 0 and 1 by StochasticDepth, 2 by MixUp or CutMix, 3 by
            ProgressiveResizing.
    """
    # Philox is counter-based: the key names the step, the upper half of the counter rank and stream.
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, step], counter=[0, 0, rank, stream]))
