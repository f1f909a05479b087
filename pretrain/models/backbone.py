"""What objectives, probes and exports call a backbone: any of them, which share these methods.

`features(images)` (B, embed_dim), `patch_grid(images)` (B, embed_dim, h, w), `feature_maps(images)` by stride, and
the attributes embed_dim, embed_dims and depths (a value a stage; a ViT is one), image_size, patch_size (pixels between
two embeddings) and stride (between two places of the patch grid).
"""

from __future__ import annotations

from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer

Backbone = VisionTransformer | SwinTransformer | PyramidVisionTransformer
