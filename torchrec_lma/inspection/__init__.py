"""Looking into an allocation: `torchrec-lma inspect`."""

from torchrec_lma.inspection.measure import inspect
from torchrec_lma.inspection.observed import ObservedIds
from torchrec_lma.inspection.report import Inspection

__all__ = ["Inspection", "ObservedIds", "inspect"]
