"""`pretrain`, with tests/objectives/self_distillation.py for the objective, whatever the recipe names.

It stands in for the branch of build_objective that one more objective brings. Started by test_self_distillation.
"""

from __future__ import annotations

import sys
from typing import Any

if __name__ == "__main__":  # loader workers import this file, and need none of it
    import torch
    from objectives.self_distillation import SelfDistillation

    from pretrain import assemble
    from pretrain.cli import main
    from pretrain.config.schema import RunConfig
    from pretrain.derived import backbone_spec
    from pretrain.models.build import build_backbone

    def build_objective(config: RunConfig, **_: Any) -> SelfDistillation:
        torch.manual_seed(config.seed)
        backbone = build_backbone(backbone_spec(config), drop_path_rate=config.model.drop_path_rate)
        return SelfDistillation(backbone, seed=config.seed, local_side=config.model.image_size // 2)

    assemble.build_objective = build_objective
    sys.exit(main())
