"""timm's own ViT in a plain PyTorch loop: `python objectives_timm.py JSON` in a process of its own.

Called by objectives.py, in whatever Python timm is installed in: it imports nothing of pretrain. The images, the
recipe and the number of steps are given to it; the loop, the loader and the crops are what anybody would write.
Prints {"step": …} lines, and {"top1": …, "loss": …} as its last one.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

LINE_EVERY_STEPS = 10


class Crops(Dataset):
    """Training images cropped at random, resized and flipped, as uint8 (3, S, S), and their labels."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, spec: dict[str, Any]) -> None:
        self.images, self.labels, self.spec = images_NHWC, labels_N, spec

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[at])
        box = self._box(*image.size)
        side = self.spec["model"]["img_size"]
        pixels = np.asarray(image.crop(box).resize((side, side), Image.Resampling.BILINEAR))
        if random.random() < self.spec["horizontal_flip"]:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self.labels[at])

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """torchvision's RandomResizedCrop."""
        (low, high), (narrow, wide) = self.spec["crop_scale"], self.spec["crop_ratio"]
        for _ in range(10):
            area = width * height * random.uniform(low, high)
            aspect = math.exp(random.uniform(math.log(narrow), math.log(wide)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = random.randint(0, width - w), random.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height


def start_worker(worker: int) -> None:
    """torch gives each worker of each epoch a seed of its own, but not to Python's generator."""
    random.seed(torch.initial_seed())


def import_timm() -> tuple[Any, torch.library.Library]:
    """timm imports torchvision, whose operators are of one build of torch; where they do not load, it needs none."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    from timm.models.vision_transformer import VisionTransformer  # noqa: F401

    return timm, library


def rate(step: int, spec: dict[str, Any]) -> float:
    """Linear warmup from 0, then half a cosine."""
    peak, floor, warmup, steps = spec["lr"], spec["min_lr"], spec["warmup_steps"], spec["steps"]
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batches(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield from loader


def main(spec: dict[str, Any]) -> dict[str, Any]:
    timm, _library = import_timm()
    from timm.optim import param_groups_weight_decay

    random.seed(spec["seed"])
    torch.manual_seed(spec["seed"])
    held = np.load(spec["images"], allow_pickle=False)
    model = timm.models.vision_transformer.VisionTransformer(**spec["model"])
    groups = param_groups_weight_decay(model, spec["weight_decay"], model.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(spec["betas"]), eps=spec["eps"])
    loader = DataLoader(
        Crops(held["train_images"], held["train_labels"], spec),
        batch_size=spec["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=spec["workers"],
        worker_init_fn=start_worker,
    )
    mean, std = (torch.tensor(spec[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    loss = torch.tensor(math.nan)
    for step, (images, labels) in zip(range(spec["steps"]), batches(loader), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, spec)
        logits = model((images / 255 - mean) / std)
        loss = F.cross_entropy(logits, labels, label_smoothing=spec["label_smoothing"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip_grad_norm"])
        optimizer.step()
        if step % LINE_EVERY_STEPS == 0:
            print(json.dumps({"step": step + 1}), flush=True)
    model.eval()
    right = 0
    with torch.no_grad():
        for begin in range(0, len(held["val_images"]), 256):
            pixels = torch.from_numpy(held["val_images"][begin : begin + 256]).permute(0, 3, 1, 2)
            found = model((pixels / 255 - mean) / std).argmax(dim=1)
            right += int((found == torch.from_numpy(held["val_labels"][begin : begin + 256])).sum())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"top1": right / len(held["val_images"]), "loss": float(loss), "parameters": parameters}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))), flush=True)
