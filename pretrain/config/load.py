"""Turn a recipe file and `key.path=value` overrides into one `RunConfig`. Called by commands.

Everything wrong is found here, before anything is written or joined, without importing torch.
"""

from __future__ import annotations

import copy
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pretrain.config.schema import RunConfig
from pretrain.errors import ConfigError

# What the recipe says elsewhere must not be said again to DeepSpeed: the two could differ.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "managed_gradient_accumulation": "train.micro_batch_size",
    "prescale_gradients": "the objective, whose loss is a share of one global mean",
    "gradient_predivide_factor": "the objective, whose loss is a share of one global mean",
}


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string and lets a repeated key win in silence; neither is meant here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` and `overrides` describe.

    Raises ConfigError (exit code 2) for a missing or malformed file, an unknown key (naming the
    nearest known one), a wrong type, or values that do not fit together.
    """
    return overridden(read_recipe(Path(path)), overrides, source=str(path))


def overridden(recipe: Mapping[str, Any], overrides: Sequence[str], *, source: str) -> RunConfig:
    """The run that plain data and overrides describe; `source` is named in errors. Raises ConfigError."""
    changed = copy.deepcopy(dict(recipe))
    for override in overrides:
        _apply_override(changed, override)
    config = parse_config(changed, source=source)
    _check_start(config, source)
    return config


def parse_config(recipe: Mapping[str, Any], *, source: str) -> RunConfig:
    """A RunConfig from plain data (a recipe's, or a checkpoint's); `source` is named in errors."""
    _refuse_unknown_keys(recipe, RunConfig, prefix="", source=source)
    try:
        config = RunConfig.model_validate(recipe)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_readable(error)}") from None
    _check_deepspeed(config, source)
    _check_optimizer(config, source)
    urls: list[tuple[str, str | None]] = [("data.train", source.url) for source in config.data.sources]
    urls += [("data.val", config.data.val), ("checkpoint.mirror", config.checkpoint.mirror)]
    for key, url in urls:
        if url and "@" in url.removeprefix("s3://").split("/")[0] and url.startswith("s3://"):
            raise ConfigError(
                f"{source}: {key} has credentials in its URL; they would end up in logs and checkpoints: "
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
    model, classifies = config.model, config.objective.name == "classification"
    if "hf" in config.export.formats and model.name == "vit" and model.pooling == "avg" and classifies:
        raise ConfigError(
            f"{source}: export.formats=hf cannot hold a class head on average pooling; take model.pooling=cls, "
            "export.formats=[timm], or export by hand with --no-head"
        )
    return config


def _check_start(config: RunConfig, source: str) -> None:
    """Not a part of parse_config: a run that was once started so is looked at and exported as it is."""
    if not config.init_from:
        return
    for key, own in (("run_dir", config.run_dir), ("checkpoint.mirror", config.checkpoint.mirror)):
        if own is not None and _is_of_run(config.init_from, own):
            raise ConfigError(
                f"{source}: init_from={config.init_from} is of the run's own {key}={own}: a run does not begin with "
                "what it is to make. Give it a place of its own, for example run_dir=runs/finetune; to go on with the "
                "run that is there, leave init_from out"
            )


def _is_of_run(path: str, run: str) -> bool:
    """Is it the run's folder or mirror, or what a run keeps there?"""
    path, run = (
        place.rstrip("/") if place.startswith("s3://") else os.path.realpath(place.removeprefix("file://"))
        for place in (path, run)
    )
    return path == run or path.startswith((f"{run}/checkpoints/", f"{run}/exports/"))


def with_defaults(config: Mapping[str, Any], model: type[BaseModel] = RunConfig) -> dict[str, Any]:
    """A config as plain data, such as a checkpoint of an older version holds, with its missing keys at their
    defaults. What is there stays, known or not.
    """
    complete = dict(config)
    for key, field in model.model_fields.items():
        value = complete.get(key)
        if key not in complete and not field.is_required():
            default = field.get_default(call_default_factory=True)
            complete[key] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
        elif isinstance(value, Mapping):
            for section in _sections(field.annotation):
                complete[key] = with_defaults(value, section)
    return complete


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such recipe; the ones that come with the project are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}") from None
    try:
        recipe = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, got {type(recipe).__name__}")
    return recipe


def _apply_override(recipe: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(
            f"{override!r} is not an override; write key.path=value, for example train.steps=100"
        )
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    *parents, last = path.split(".")
    section = recipe
    for parent in parents:
        below = section.get(parent)
        if below is None:
            below = section[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
        section = below
    section[last] = value
    # Steps and epochs exclude each other; the override is the later word.
    if path in ("train.steps", "train.epochs") and value is not None:
        section.pop("epochs" if last == "steps" else "steps", None)
    if path in ("optim.lr", "optim.base_lr") and value is not None:  # as do these
        section.pop("base_lr" if last == "lr" else "lr", None)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for option in typing.get_args(annotation):
            yield from _sections(option)


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key a recipe may hold, dotted."""
    for name, field in model.model_fields.items():
        below = list(_sections(field.annotation))
        yield f"{prefix}{name}"
        for section in below:
            yield from known_keys(section, f"{prefix}{name}.")


def _refuse_unknown_keys(
    recipe: Mapping[str, Any], model: type[BaseModel], *, prefix: str, source: str
) -> None:
    for key, value in recipe.items():
        if key not in model.model_fields:
            raise ConfigError(f"{source}: unknown key {prefix}{key}{_nearest(f'{prefix}{key}')}")
        for section in _sections(model.model_fields[key].annotation):
            if isinstance(value, Mapping):
                _refuse_unknown_keys(value, section, prefix=f"{prefix}{key}.", source=source)


def _nearest(key: str) -> str:
    candidates = list(known_keys())
    near = get_close_matches(key, candidates, n=1, cutoff=0.6)
    if not near:  # the right name in the wrong section
        last = key.rsplit(".", 1)[-1]
        by_name = {candidate.rsplit(".", 1)[-1]: candidate for candidate in candidates}
        near = [by_name[name] for name in get_close_matches(last, by_name, n=1, cutoff=0.75)]
    return f"; did you mean {near[0]}?" if near else "; configs/ and pretrain/config/ show the known ones"


def _readable(error: ValidationError) -> str:
    parts = []
    for issue in error.errors():
        where = ".".join(str(part) for part in issue["loc"])
        message = issue["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if issue["type"] == "missing":
            parts.append(f"{where} is missing; set it in the recipe or as {where}=VALUE")
        elif issue["type"] == "value_error":  # our own validators, which name their keys
            parts.append(message)
        else:
            parts.append(f"{where}: {message}, got {issue['input']!r} ({type(issue['input']).__name__})")
    return "; ".join(parts)


def _check_deepspeed(config: RunConfig, source: str) -> None:
    for key, ours in DERIVED_DEEPSPEED_KEYS.items():
        if key in config.deepspeed:
            raise ConfigError(f"{source}: deepspeed.{key} follows from {ours}; set that, and leave this out")
    stage = zero_stage(config)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{source}: deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")


def _check_optimizer(config: RunConfig, source: str) -> None:
    """A ZeRO stage hands an optimizer flat pieces of parameters; not every one is then still the one it was."""
    name, stage = config.optim.name, zero_stage(config)
    if name == "lamb" and stage == 3:
        raise ConfigError(
            f"{source}: optim.name=lamb needs the norms of whole parameters, which ZeRO stage 3 does not let it see; "
            "take deepspeed.zero_optimization.stage=2, or optim.name=adamw"
        )
    if name == "muon" and not (stage == 0 or (stage == 1 and config.train.precision == "bf16")):
        raise ConfigError(
            f"{source}: optim.name=muon works at ZeRO stage 1 in bf16, and at stage 0; got stage {stage} in "
            f"{config.train.precision}, where DeepSpeed clips Muon's update instead of the gradient, and keeps its "
            "momentum in another form: set deepspeed.zero_optimization.stage=0 (also for one device in float32), or "
            "stage=1 and train.precision=bf16"
        )


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage a run asks for; 1 when it does not say."""
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"deepspeed.zero_optimization is a mapping, got {zero!r}; write its stage inside")
    return zero.get("stage", 1)


def as_yaml(config: RunConfig) -> str:
    """The resolved recipe, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
