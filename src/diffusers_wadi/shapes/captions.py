"""Captions of Shapes World as plain strings: the prompt source for `train_wadi.py`, which needs no images."""

from .scenes import heldout_captions, training_captions

__all__ = ["heldout_captions", "training_captions"]
