"""Activation checkpointing: blocks are computed again in the backward pass instead of keeping their activations."""

from .activation_checkpointing import (
    ActivationCheckpointing,
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)

__all__ = ["ActivationCheckpointing", "apply_activation_checkpointing", "remove_activation_checkpointing"]
