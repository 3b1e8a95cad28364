"""Sharpness-aware minimization (Foret et al. 2021)."""

from .sam import SAM, sam_perturbation

__all__ = ["SAM", "sam_perturbation"]
