"""What functions return, for annotations and ``isinstance``; nobody makes these by hand."""

from pyro_bmr.averaging.average import Average
from pyro_bmr.averaging.compared_models import ModelComparison
from pyro_bmr.averaging.named_models import ModelGrid
from pyro_bmr.averaging.presence import Presence
from pyro_bmr.compaction import Compaction
from pyro_bmr.diagnostics.audit import Audit
from pyro_bmr.diagnostics.comparison import Comparison
from pyro_bmr.export.costs import Costs
from pyro_bmr.second_level.group_level import GroupLevel
from pyro_bmr.second_level.left_out import LeftOut
from pyro_bmr.sparsities import Sparsities
from pyro_bmr.tuning import TunedPrior

__all__ = [
    "Audit",
    "Average",
    "Compaction",
    "Comparison",
    "Costs",
    "GroupLevel",
    "LeftOut",
    "ModelComparison",
    "ModelGrid",
    "Presence",
    "Sparsities",
    "TunedPrior",
]
