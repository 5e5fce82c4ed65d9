"""Resonate: reinforcement learning for text-to-audio flow models, small enough to read."""

__version__ = "0.1.0"
