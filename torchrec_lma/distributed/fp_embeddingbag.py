"""The sharder of feature processors, which refuses those around an LMA collection."""

from torch import nn
from torchrec.distributed.fp_embeddingbag import FeatureProcessedEmbeddingBagCollectionSharder
from torchrec.modules.fp_embedding_modules import FeatureProcessedEmbeddingBagCollection

from torchrec_lma.modules import LMAEmbeddingBagCollection


class FeatureProcessedSharder(FeatureProcessedEmbeddingBagCollectionSharder):
    """TorchRec's sharder of FeatureProcessedEmbeddingBagCollection, for plain collections.

    It runs the processors where ids arrive, because the input dist carries no gradient to those before it. There rows
    of levels arrive, which have neither the feature's name nor a place in its bag.
    """

    def shardable_parameters(self, module: FeatureProcessedEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """Raises NotImplementedError for an LMA collection."""
        if isinstance(module._embedding_bag_collection, LMAEmbeddingBagCollection):
            raise NotImplementedError(
                "feature processors around a sharded LMAEmbeddingBagCollection would not be trained: gradients of "
                "per-sample weights do not pass the input dist. Give processed features full tables, or weights that "
                "are not trained; with processors that do not train, leave this sharder out of the list"
            )
        return super().shardable_parameters(module)
