"""Order statistics of filters' activations."""

import pytest
import torch

from picnn_fast.metrics.thresholds import kth_greatest


@pytest.mark.parametrize("k", [1, 2, 17, 71, 72])
@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_it_is_the_k_th_of_all_positions_of_the_images_that_count(
    monkeypatch: pytest.MonkeyPatch, k: int, block: int
) -> None:
    monkeypatch.setattr("picnn_fast.metrics.thresholds._BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(9, (n, 4, 4, 3), generator=generator).float() for n in (5, 0, 4)]
    images = [torch.tensor([0, 2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 2, 3])]
    filters = torch.tensor([3, 1])
    want = []
    for f in filters.tolist():
        values = []
        for maps, rows in zip(batches, images, strict=True):
            for image in rows.tolist():
                values += maps[image, f].flatten().tolist()
        want.append(sorted(values, reverse=True)[k - 1])
    assert kth_greatest(batches, k, images=images, filters=filters).tolist() == want


def test_without_a_choice_all_images_and_filters_count() -> None:
    maps = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    want = maps.movedim(1, 0).flatten(1).sort(descending=True).values[:, 4]
    assert torch.equal(kth_greatest([maps[:4], maps[4:]], 5), want)
