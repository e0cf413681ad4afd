"""Stage 1 at the client: the seed routing vector."""

import numpy as np
import torch
from datasets import Dataset

from common.data.tasks import batches
from common.model.routing import mean_over_samples
from common.model.seed import Seed, embed


@torch.inference_mode()
def seed_routing_vector(seed: Seed, private: Dataset) -> np.ndarray:
    """mu_p, the mean of the seed's embedding over the private samples. float32 [d]."""
    return mean_over_samples(embed(seed.model, batch) for batch in batches(seed, private)).astype(np.float32)
