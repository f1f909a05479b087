"""Backbones and their parts. Parameter names follow timm."""
