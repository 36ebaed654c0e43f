"""The work list of paged attention: blocks of query rows, and where their keys are."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionPlan:
    """Work list of one call: blocks of `block_rows` query rows, each from one sequence.

    Block i covers rows [i * block_rows, (i + 1) * block_rows) of q. Its row j is at position p = `block_pos[i] + j` of
    its sequence and sees the keys at positions t <= p (and, with a window w, t > p - w). Key t of sequence s is in page
    `tables[s, t // page_size]` at offset `t % page_size`. A pytree of int32 arrays, numpy or jax; values are not
    checked on the device.

    Attributes:
        block_seq: Row of `tables` for each block.
        block_pos: Absolute position of each block's first row.
        block_len: Rows in use, 0 to block_rows; 0 marks a padding block.
        tables: Page ids; entries beyond the end of a sequence are never used, but must be valid ids.
    """

    block_seq: Int[Array, " NB"]
    block_pos: Int[Array, " NB"]
    block_len: Int[Array, " NB"]
    tables: Int[Array, "Q MaxPages"]

    def check(self, rows: int, block_rows: int) -> None:
        """Checks that the plan's shapes fit `rows` query rows in blocks of `block_rows`.

        Raises:
            ValueError: sizes disagree; the message gives both.
            TypeError: an array is not int32.
        """
        if block_rows < 1 or rows % block_rows:
            raise ValueError(f"q: got {rows} rows, expected a multiple of block_rows={block_rows}")
        for name in ("block_seq", "block_pos", "block_len"):
            shape = getattr(self, name).shape
            if shape != (rows // block_rows,):
                raise ValueError(
                    f"plan.{name}: got shape {shape}, expected {(rows // block_rows,)} "
                    f"for {rows} rows in blocks of {block_rows}"
                )
        if len(self.tables.shape) != 2 or 0 in self.tables.shape:
            raise ValueError(f"plan.tables: got shape {self.tables.shape}, expected [sequences, pages], both > 0")
        for name in ("block_seq", "block_pos", "block_len", "tables"):
            dtype = getattr(self, name).dtype
            if dtype != jnp.int32:
                raise TypeError(f"plan.{name}: got dtype {dtype}, expected int32")
