"""All that a host looks at by itself in a preflight, and what it tells for hosts to be compared. Used by probe.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from launch.checks import Check, Place, bounded, code_digest, free_space, ports, run_folder, versions
from launch.device_checks import devices, kinds
from launch.store_checks import beginning, cache, data, datasets, mirror, store_clock
from pretrain.config.load import as_yaml
from pretrain.config.schema import RunConfig
from pretrain.storage import is_remote


def of_host() -> dict[str, Any]:
    """What does not follow from the recipe."""
    return {"versions": versions(), "code": code_digest(), **kinds()}


def of_recipe(config: RunConfig, place: Place) -> dict[str, Any]:
    free, kept = free_space(config)
    return {
        "recipe": hashlib.sha256(as_yaml(config).encode()).hexdigest(),
        "free_bytes": free,
        "kept": kept,
        "checks": checks(config, place),
        "store_clock": store_clock(config) if place.reads else None,
    }


def checks(config: RunConfig, place: Place) -> list[dict[str, Any]]:
    """All checks that this host can do alone."""
    wanted: list[tuple[str, Callable[[], Check]]] = [
        ("devices", lambda: devices(config, place)),
        ("run folder", lambda: run_folder(config, place)),
        ("ports", lambda: ports(config)),
    ]
    if place.reads:
        wanted.append(("data", lambda: data(config)))
        if any(is_remote(url) for url in datasets(config)):
            wanted.append(("cache", lambda: cache(config)))
        if config.init_from is not None:
            wanted.append(("init_from", lambda: beginning(config)))
        if config.checkpoint.mirror is not None:
            wanted.append(("mirror", lambda: mirror(config)))
    return [asdict(bounded(name, check)) for name, check in wanted]
