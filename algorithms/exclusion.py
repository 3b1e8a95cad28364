"""Refuses algorithms that a run may have only once."""

from ..engine import Algorithm, State


def check_only_one(algorithm: Algorithm, state: State, reason: str) -> None:
    """Check that a run has no second algorithm of a class.

    Args:
        algorithm: One of them.
        state: The run.
        reason: Why there may not be two, for the message.

    Raises:
        ValueError: If there are several.
    """
    if sum(isinstance(other, type(algorithm)) for other in state.algorithms) > 1:
        raise ValueError(f"a run must have at most one {type(algorithm).__name__}: {reason}")
