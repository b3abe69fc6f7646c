"""Interpretable networks: one file a method, one common protocol (``InterpretableNetwork``)."""

from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.correspondence import Correspondence
from picnn_fast.models.csg import CSG
from picnn_fast.models.explainer import Explainer
from picnn_fast.models.factory import METHODS, make_interpretable
from picnn_fast.models.iccnn import ICCNN
from picnn_fast.models.icnn import ICNN
from picnn_fast.models.picnn import PICNN
from picnn_fast.models.std import STD, as_std
from picnn_fast.models.weights import filter_weights

__all__ = [
    "CSG",
    "ICCNN",
    "ICNN",
    "METHODS",
    "PICNN",
    "STD",
    "Correspondence",
    "Explainer",
    "InterpretableNetwork",
    "as_std",
    "filter_weights",
    "make_interpretable",
]
