"""What a loss may see of one pack beside log-probs and weights: its samples, and what they brought along."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from loquetier_jax.batch.packs import SAMPLE_ALIGN, Pack


@flax.struct.dataclass
class LossBatch:
    """One pack of L rows and of at most S = L / 32 samples, in order; groups of samples stay together and whole.

    Sums over samples are ordered, so that a loss gives the same bits every time; `jax.ops.segment_sum` and indexing
    with `segment_ids` would scatter, on a GPU in any order.

    Attributes:
        targets: [L] the token id whose log-prob the row has.
        positions: [L] place of the row in its sample, from 0.
        segment_ids: [L] which sample of the pack the row belongs to, from 0; -1 on padding.
        extras: By name, what the samples brought along (`Sample.extras`): [L] where a sample has a number per row,
            [S] where it has one; 0 on padding and beyond the last sample.
    """

    targets: Int[Array, " L"]
    positions: Int[Array, " L"]
    segment_ids: Int[Array, " L"]
    extras: dict[str, Array]

    @property
    def sample_mask(self) -> Bool[Array, " S"]:
        """Which of the S places hold a sample."""
        return self._members.any(axis=1)

    def sum_by_sample(self, x: Float[Array, " L"]) -> Float[Array, " S"]:
        """The sum of `x` over the rows of each sample; 0 beyond the last one."""
        blocks = jnp.where(self.segment_ids >= 0, x, 0).reshape(-1, SAMPLE_ALIGN).sum(axis=1)
        return jnp.where(self._members, blocks, 0).sum(axis=1)

    def to_rows(self, x: Float[Array, " S"]) -> Float[Array, " L"]:
        """The number of its sample for each row; 0 on padding."""
        blocks = jnp.where(self._members, x[:, None], 0).sum(axis=0)
        rows = jnp.broadcast_to(blocks[:, None], (len(blocks), SAMPLE_ALIGN)).reshape(-1)
        return jnp.where(self.segment_ids >= 0, rows, 0)

    @property
    def _members(self) -> Bool[Array, "S S"]:
        """Whether block j of SAMPLE_ALIGN rows belongs to sample i: a sample starts on the first row of a block."""
        blocks = self.segment_ids[::SAMPLE_ALIGN]
        return blocks[None, :] == jnp.arange(len(blocks))[:, None]


def loss_batch(pack: Pack) -> LossBatch:
    """A pack on the host as its loss sees it: numpy arrays, to be handed to a compiled function."""
    return LossBatch(pack.targets, pack.positions, pack.segments, dict(pack.extras))
