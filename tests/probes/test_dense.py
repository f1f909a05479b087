"""The dense probe's classifier, from sums over patches, against numpy's lstsq on the patches themselves."""

import numpy as np
import pytest
import torch

from pretrain.errors import DataError
from pretrain.probes.dense import RIDGE, PatchStatistics, labels_of_patches

CLASSES, D = 3, 5


def grids(count, seed, noise=1.0):
    """Patch features (N, D, 2, 3) around their image's class, with offsets and scales of their own; labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    grid = centres[labels][:, :, None, None] + noise * torch.randn(count, D, 2, 3, generator=generator)
    return grid * torch.tensor([1.0, 5.0, 0.1, 1.0, 1.0])[:, None, None] + 30.0, labels


def patches_of(grid, labels):
    rows = grid.permute(0, 2, 3, 1).reshape(-1, D).double().numpy()
    return rows, labels.repeat_interleave(6).numpy()


def fit(grid, labels, batch=7):
    statistics = PatchStatistics(num_classes=CLASSES, device=torch.device("cpu"))
    for part, of_part in zip(grid.split(batch), labels.split(batch), strict=True):
        statistics.add(part, labels_of_patches(of_part, part))
    return statistics.fit()


def test_the_classifier_from_sums_is_numpys_ridge_on_all_patches():
    grid, labels = grids(40, 1)
    x, y = patches_of(grid, labels)
    n, mean, std = len(x), x.mean(0), x.std(0)
    z, target = (x - mean) / std, np.eye(CLASSES)[y]
    bias = target.mean(0)
    rows = np.r_[z, np.sqrt(n * RIDGE) * np.eye(D)]
    weight = np.linalg.lstsq(rows, np.r_[target - bias, np.zeros((D, CLASSES))], rcond=None)[0]
    fitted = fit(grid, labels)
    np.testing.assert_allclose(fitted.weight, weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(fitted.bias, bias)

    val, truth = grids(30, 2)
    q, wanted = patches_of(val, truth)
    expected = ((((q - mean) / std) @ weight + bias).argmax(1) == wanted).mean()
    assert 0.4 < expected < 0.95
    fitted.add(val[:20], labels_of_patches(truth[:20], val[:20]))
    fitted.add(val[20:], labels_of_patches(truth[20:], val[20:]))
    assert fitted.top1() == pytest.approx(expected)


def test_patches_may_have_labels_of_their_own_and_those_below_zero_do_not_count():
    grid, labels = grids(12, 1)
    own = labels_of_patches(labels, grid).clone()
    own[3:, 0, 0] = -1
    statistics = PatchStatistics(num_classes=CLASSES, device=torch.device("cpu"))
    statistics.add(grid, own)
    x, y = patches_of(grid, labels)
    counted = own.flatten().numpy() >= 0
    assert counted.sum() == 12 * 6 - 9
    fitted = statistics.fit()
    np.testing.assert_allclose(fitted.mean, x[counted].mean(0))
    np.testing.assert_allclose(fitted.bias, np.bincount(y[counted], minlength=CLASSES) / counted.sum())


def test_no_labelled_patch_is_an_error():
    grid, labels = grids(4, 1)
    statistics = PatchStatistics(num_classes=CLASSES, device=torch.device("cpu"))
    with pytest.raises(DataError, match="no samples"):
        statistics.fit()
    statistics.add(grid, labels_of_patches(labels * 0 - 1, grid))
    with pytest.raises(DataError, match="no labelled samples"):
        statistics.fit()
    with pytest.raises(DataError, match="validation data"):
        fit(grid, labels).top1()


def test_a_feature_that_never_changes_does_no_harm_however_large_it_is():
    grid, labels = grids(40, 1)
    val, truth = grids(30, 2)
    expected = fit(grid, labels)
    expected.add(val, labels_of_patches(truth, val))
    for value in (0.0, 1e4):
        constant = (torch.cat([one, torch.full_like(one[:, :1], value)], 1) for one in (grid, val))
        grid_more, val_more = constant
        fitted = fit(grid_more, labels)
        fitted.add(val_more, labels_of_patches(truth, val_more))
        assert fitted.top1() == expected.top1()


def test_features_that_are_not_finite_are_not_right():
    grid, labels = grids(40, 1)
    fitted = fit(grid, labels)
    fitted.add(grid, labels_of_patches(labels, grid))
    assert fitted.top1() > 0.5
    fitted = fit(grid, labels)
    fitted.add(grid * torch.nan, labels_of_patches(labels, grid))
    assert fitted.top1() == 0.0
    grid[3, 2, 1, 1] = torch.inf
    fitted = fit(grid, labels)
    fitted.add(grid, labels_of_patches(labels, grid))
    assert fitted.top1() == 0.0
