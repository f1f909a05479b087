"""Distributed pretraining of vision transformers: data, training, checkpoints, transfer."""

__version__ = "0.1.0"
