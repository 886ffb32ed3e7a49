"""Reversible networks for PyTorch: training memory that does not grow with depth."""

from revcore.additive import AdditiveCoupling
from revcore.affine import AffineCoupling, bounded_adapter, exp_adapter, sigmoid_adapter
from revcore.block import ReversibleBlock
from revcore.check import BlockCheck, InvertibilityReport, check_invertible
from revcore.coupling import Coupling
from revcore.destination import Destination, get_destination
from revcore.drift import Drift, track_drift
from revcore.fixed_point import FixedPointCoupling
from revcore.half_step import HalfStep, Scheme
from revcore.known import self_contained
from revcore.memory import track_memory
from revcore.recompute import recompute
from revcore.remember import remember
from revcore.reversible import set_reversing
from revcore.sequential import ReversibleSequential

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "BlockCheck",
    "Coupling",
    "Destination",
    "Drift",
    "FixedPointCoupling",
    "HalfStep",
    "InvertibilityReport",
    "ReversibleBlock",
    "ReversibleSequential",
    "Scheme",
    "bounded_adapter",
    "check_invertible",
    "exp_adapter",
    "get_destination",
    "recompute",
    "remember",
    "self_contained",
    "set_reversing",
    "sigmoid_adapter",
    "track_drift",
    "track_memory",
]
