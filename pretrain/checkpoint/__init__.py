"""Checkpoints that any world size and ZeRO stage can load."""
