"""Operator of the nearest-neighbour estimate of mutual information (Ross 2014)."""

import torch
from torch import Tensor

from picnn_fast.ops.define import define
from picnn_fast.reference import mutual_information as reference


def _fake_knn_mutual_information(
    values: Tensor, labels: Tensor, num_classes: int, n_neighbors: int
) -> tuple[Tensor, Tensor]:
    filters = values.shape[0]
    return (
        values.new_empty((num_classes, filters), dtype=torch.float64),
        values.new_empty((filters,), dtype=torch.float64),
    )


define(
    "mutual_information",
    "knn_mutual_information(Tensor values, Tensor labels, SymInt num_classes, int n_neighbors)"
    " -> (Tensor per_class, Tensor joint)",
    reference=reference.knn_mutual_information,
    fake=_fake_knn_mutual_information,
)
