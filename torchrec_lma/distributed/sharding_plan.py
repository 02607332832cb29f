"""The sharders to hand to DistributedModelParallel and the planner."""

from typing import Any

from torch import nn
from torchrec.distributed.sharding_plan import get_default_sharders as get_torchrec_sharders
from torchrec.distributed.types import ModuleSharder

from torchrec_lma.distributed.embedding import LMAEmbeddingCollectionSharder
from torchrec_lma.distributed.embeddingbag import LMAEmbeddingBagCollectionSharder
from torchrec_lma.distributed.fp_embeddingbag import FeatureProcessedSharder


def get_default_sharders() -> list[ModuleSharder[nn.Module]]:
    """TorchRec's default sharders and LMA's; the one of feature processors takes both."""
    ours: list[ModuleSharder[Any]] = [
        LMAEmbeddingBagCollectionSharder(),
        LMAEmbeddingCollectionSharder(),
        FeatureProcessedSharder(),
    ]
    types = {sharder.module_type for sharder in ours}
    return [*(sharder for sharder in get_torchrec_sharders() if sharder.module_type not in types), *ours]
