"""Looking into an allocation: `torchrec-lma inspect`."""

from torchrec_lma.inspection.measure import Inspection, inspect
from torchrec_lma.inspection.observed import ObservedIds

__all__ = ["Inspection", "ObservedIds", "inspect"]
