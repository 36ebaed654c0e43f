"""The input of a custom loss besides log-probs and weights: the samples of a pack and their extras."""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.batch.packs import SAMPLE_ALIGN, Pack


@struct.dataclass
class LossBatch:
    """One pack of L rows with at most S = L / 32 samples, in order; groups of samples are never split.

    Sums over samples have a fixed order, so that a loss is bit-reproducible; `jax.ops.segment_sum` and indexing with
    `segment_ids` would scatter, on a GPU in arbitrary order.

    Attributes:
        targets: [L] target token id of each row.
        positions: [L] position of the row in its sample, from 0.
        segment_ids: [L] index of the row's sample in the pack, from 0; -1 on padding.
        extras: The samples' extras by name (`Sample.extras`): [L] for a number per row, [S] for a number per sample; 0
            on padding and beyond the last sample.
    """

    targets: Int[Array, " L"]
    positions: Int[Array, " L"]
    segment_ids: Int[Array, " L"]
    extras: dict[str, Array]

    @property
    def sample_mask(self) -> Bool[Array, " S"]:
        """Which of the S entries have a sample."""
        return self._members.any(axis=1)

    def sum_by_sample(self, x: Float[Array, " L"]) -> Float[Array, " S"]:
        """The sum of `x` over the rows of each sample; 0 beyond the last sample."""
        blocks = jnp.where(self.segment_ids >= 0, x, 0).reshape(-1, SAMPLE_ALIGN).sum(axis=1)
        return jnp.where(self._members, blocks, 0).sum(axis=1)

    def to_rows(self, x: Float[Array, " S"]) -> Float[Array, " L"]:
        """For each row, the value of `x` of its sample; 0 on padding."""
        blocks = jnp.where(self._members, x[:, None], 0).sum(axis=0)
        rows = jnp.broadcast_to(blocks[:, None], (len(blocks), SAMPLE_ALIGN)).reshape(-1)
        return jnp.where(self.segment_ids >= 0, rows, 0)

    @property
    def _members(self) -> Bool[Array, "S S"]:
        """[i, j]: whether block j of SAMPLE_ALIGN rows belongs to sample i; samples start on block boundaries."""
        blocks = self.segment_ids[::SAMPLE_ALIGN]
        return blocks[None, :] == jnp.arange(len(blocks))[:, None]


def loss_batch(pack: Pack) -> LossBatch:
    """The LossBatch of a pack, as numpy arrays for a compiled function."""
    return LossBatch(pack.targets, pack.positions, pack.segments, dict(pack.extras))
