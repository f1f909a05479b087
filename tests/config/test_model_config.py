"""Recipes of every backbone and of masked objectives: what they default to, take and refuse, and dry runs of them."""

from typing import Any

import pytest
import yaml

from pretrain.config.load import as_yaml, overridden, parse_config, with_defaults
from pretrain.config.model import MODEL_SIZES
from pretrain.config.schema import RunConfig
from pretrain.derived import backbone_spec, check_exports
from pretrain.errors import ConfigError
from pretrain.models.sizes import PVT_SIZES, SWIN_SIZES, SWIN_V2_SIZES, VIT_SIZES
from pretrain.recipe import describe

COMMON: dict[str, Any] = {
    "run_dir": "RUN",
    "data": {"train": "SHARDS"},
    "train": {"global_batch_size": 64, "steps": 10},
}


def config_of(model: dict[str, Any], *overrides: str, **sections: Any) -> RunConfig:
    return overridden({**COMMON, "model": model, **sections}, overrides, source="test")


def test_the_schema_names_the_sizes_that_there_are() -> None:
    assert {name: tuple(sizes) for name, sizes in MODEL_SIZES.items()} == {
        "vit": tuple(VIT_SIZES),
        "swin": tuple(SWIN_SIZES),
        "swin_v2": tuple(SWIN_V2_SIZES),
        "pvt": tuple(PVT_SIZES),
    }


@pytest.mark.parametrize(
    ("model", "depths", "width"),
    [
        ({"name": "swin", "size": "large"}, (2, 2, 18, 2), 1536),
        ({"name": "swin", "embed_dim": 16, "depths": [1, 1], "stage_heads": [1, 2]}, (1, 1), 32),
        ({"name": "swin_v2", "size": "base"}, (2, 2, 18, 2), 1024),
        ({"name": "pvt", "size": "b5"}, (3, 6, 40, 3), 512),
        (
            {
                "name": "pvt",
                "embed_dims": [8, 12],
                "depths": [1, 2],
                "stage_heads": [1, 3],
                "mlp_ratios": [4, 2.5],
                "sr_ratios": [2, 1],
            },
            (1, 2),
            12,
        ),
    ],
)
def test_a_staged_backbone_has_patches_of_four_and_average_pooling_and_reads_back_as_itself(
    model: dict[str, Any], depths: tuple[int, ...], width: int
) -> None:
    config = config_of(model)
    assert (config.model.patch_size, config.model.pooling) == (4, "avg")
    assert parse_config(yaml.safe_load(as_yaml(config)), source="resolved") == config
    spec = backbone_spec(config)
    assert (spec.depths, spec.embed_dim, spec.depth) == (depths, width, sum(depths))


def test_the_options_of_a_vit_reach_its_description() -> None:
    options = {
        "num_registers": 4,
        "layer_scale_init": 0.1,
        "qk_norm": True,
        "mlp": "swiglu",
        "pooling": "map",
    }
    spec = backbone_spec(
        config_of({"size": "tiny", "position_embedding": "rope", "rotary_grid": 7, **options})
    )
    assert {name: getattr(spec, name) for name in options} == options
    assert (spec.position_embedding, spec.rotary_grid) == ("rope", 7)


def test_windows_that_weights_were_trained_with_reach_the_description_and_zeros_are_none() -> None:
    model = {"name": "swin_v2", "size": "tiny", "window_size": 14, "pretrained_window_sizes": [12, 12, 0, 6]}
    spec = backbone_spec(config_of(model))
    assert spec.pretrained_window_sizes == (12, 12, 0, 6)
    assert spec.position_windows == (12, 12, 14, 6)  # the third stage has 14 tokens a side, and one window
    none = backbone_spec(config_of({**model, "pretrained_window_sizes": [0, 0, 0, 0]}))
    assert none.pretrained_window_sizes is None
    assert none.position_windows == (14, 14, 14, 7)


def test_simmim_masks_six_tenths_in_squares_of_32_pixels_unless_told_otherwise() -> None:
    config = config_of({"name": "swin", "size": "tiny"}, objective={"name": "simmim"})
    assert (config.objective.mask_ratio, config.objective.mask_patch_size) == (0.6, 32)
    changed = config_of(
        {"name": "swin", "size": "tiny"}, "objective.mask_ratio=0.5", objective={"name": "simmim"}
    )
    assert changed.objective.mask_ratio == 0.5
    assert config_of({"size": "tiny"}, objective={"name": "mae"}).objective.mask_ratio == 0.75


SWIN, TINY = {"name": "swin", "size": "tiny"}, {"size": "tiny"}
SWIN_V2 = {"name": "swin_v2", "size": "tiny"}
SIMMIM, MAE = {"name": "simmim"}, {"name": "mae"}


@pytest.mark.parametrize(
    ("model", "objective", "told"),
    [
        ({"name": "swin", "size": "huge"}, {}, "model.size=huge: of model.name=swin take one of tiny, small"),
        ({"size": "b0"}, {}, "of model.name=vit take one of tiny"),
        ({"name": "swin", "depths": [2, 2]}, {}, "all of model.embed_dim, model.depths, model.stage_heads"),
        ({**SWIN, "depths": [2, 2, 2, 2]}, {}, "model.size sets depths"),
        ({**SWIN, "pooling": "cls"}, {}, "model.pooling=cls: a swin has no class token"),
        ({**SWIN, "num_registers": 4}, {}, "model.num_registers=4 means nothing to model.name=swin"),
        ({**SWIN, "drop_path_mode": "batch_subset"}, {}, "model.drop_path_mode=batch_subset means nothing"),
        ({**SWIN, "sr_ratios": [8, 4, 2, 1]}, {}, "model.sr_ratios=(8, 4, 2, 1) means nothing"),
        (
            {**SWIN, "pretrained_window_sizes": [12, 12, 12, 6]},
            {},
            "model.pretrained_window_sizes=(12, 12, 12, 6) means nothing to model.name=swin;",
        ),
        (
            {**SWIN_V2, "pretrained_window_sizes": [12, 6]},
            {},
            "model.pretrained_window_sizes=(12, 6): give one a stage, 4 of them",
        ),
        ({**SWIN_V2, "num_registers": 4}, {}, "model.num_registers=4 means nothing to model.name=swin_v2"),
        ({"name": "swin_v2", "size": "huge"}, {}, "of model.name=swin_v2 take one of tiny, small"),
        (
            {"name": "swin_v2", "depths": [2, 2]},
            {},
            "all of model.embed_dim, model.depths, model.stage_heads",
        ),
        ({"name": "pvt", "size": "b0", "window_size": 4}, {}, "model.window_size=4 means nothing"),
        ({"name": "pvt", "size": "b0", "patch_size": 8}, {}, "model.patch_size=8: a pvt's is 4"),
        ({"size": "tiny", "depths": [12]}, {}, "model.depths=(12,) means nothing to model.name=vit"),
        ({"size": "tiny", "rotary_grid": 14}, {}, "model.rotary_grid is for model.position_embedding=rope"),
        (
            {"embed_dim": 24, "depth": 1, "num_heads": 4, "position_embedding": "rope"},
            {},
            "is not a multiple of 4, as rope needs",
        ),
        (SWIN, MAE, "a swin cannot; take objective.name=simmim"),
        (SWIN_V2, MAE, "a swin_v2 cannot; take objective.name=simmim"),
        (
            {"size": "tiny", "pooling": "map"},
            MAE,
            "model.pooling=map would not be trained by objective.name=mae",
        ),
        ({"size": "tiny", "pooling": "map"}, SIMMIM, "would not be trained by objective.name=simmim"),
        (
            {**SWIN, "image_size": 208},
            SIMMIM,
            "model.image_size=208 one of it and of the backbone's stride, 32",
        ),
        (
            {"size": "huge", "patch_size": 14},
            SIMMIM,
            "objective.mask_patch_size=32 must be a multiple of model.patch",
        ),
        ({**TINY, "image_size": 32}, SIMMIM, "of 1 squares of 32 pixels leaves none"),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(
    model: dict[str, Any], objective: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        config_of(model, objective=objective)
    assert told in str(raised.value)


def test_dimensions_that_do_not_go_together_are_refused_when_they_are_resolved() -> None:
    uneven = {"name": "pvt", "embed_dims": [8, 16], "depths": [1, 1], "stage_heads": [1, 2]}
    with pytest.raises(ConfigError, match=r"2 of model\.embed_dims.* 4 of model\.mlp_ratios"):
        backbone_spec(config_of(uneven))
    heads = {"name": "swin", "embed_dim": 16, "depths": [1, 1], "stage_heads": [1, 3]}
    with pytest.raises(ConfigError, match="width 32 is not a multiple of its 3 heads"):
        backbone_spec(config_of(heads))


UNEVEN_MLP = {
    **{"embed_dims": [8, 16], "depths": [1, 1], "stage_heads": [1, 2]},
    **{"mlp_ratios": [8, 3.5], "sr_ratios": [2, 1]},
}


@pytest.mark.parametrize(
    ("model", "format", "told"),
    [
        ({**UNEVEN_MLP, "name": "pvt"}, "hf", "whole numbers"),
        ({**SWIN, "image_size": 192}, "hf", "the last has 6 tokens a side"),
        ({**SWIN, "image_size": 256}, "timm", "take an image_size that is a multiple of 224"),
        ({**SWIN_V2, "image_size": 256}, "timm", "take an image_size that is a multiple of 224"),
        ({**SWIN_V2, "image_size": 208}, "hf", "takes the 7 tokens a side of stage 4 for 6"),
        ({**SWIN_V2, "pretrained_window_sizes": [1, 0, 0, 0]}, "hf", "pretrained_window_sizes less 1"),
        ({**TINY, "num_registers": 4}, "hf", "no registers"),
        ({**TINY, "position_embedding": "rope"}, "timm", "rotary positions is not written yet"),
    ],
)
def test_a_format_that_cannot_hold_the_backbone_is_refused_before_the_run(
    model: dict[str, Any], format: str, told: str
) -> None:
    config = config_of(model, f"export.formats=[{format}]")
    with pytest.raises(ConfigError) as raised:
        check_exports(config)
    assert told in str(raised.value)
    assert told in describe(config, world_size=2)


@pytest.mark.parametrize("objective", ["classification", "simmim"])
@pytest.mark.parametrize(
    "model", [SWIN, SWIN_V2, {"name": "pvt", "size": "b2"}, {"size": "tiny", "mlp": "swiglu"}]
)
def test_a_dry_run_describes_every_backbone(model: dict[str, Any], objective: str) -> None:
    said = describe(config_of(model, objective={"name": objective}), world_size=4)
    assert "export formats" in said
    assert "micro-batches a step" in said


def test_a_checkpoint_of_before_has_the_options_at_what_they_were() -> None:
    model = {"name": "vit", "size": "tiny", "pooling": "cls", "drop_path_rate": 0.1}
    before = with_defaults({**COMMON, "model": model})
    now = config_of(model).model_dump(mode="json")
    assert before["model"] == now["model"]
    assert before["objective"] == now["objective"]
