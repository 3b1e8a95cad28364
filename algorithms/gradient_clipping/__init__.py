"""Gradient clipping by norm, by value, or adaptive."""

from .gradient_clipping import GradientClipping, apply_gradient_clipping

__all__ = ["GradientClipping", "apply_gradient_clipping"]
