"""The batch of one step: the rows of a bucket as a pytree, and the flat buffer that carries it to the device."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt

from loquetier_jax.config import BLOCK, Bucket, EngineConfig
from pallas_kernels import AttentionPlan, SmlmPlan, plan_shapes
from pallas_kernels.smlm import num_wide_bound


@struct.dataclass
class PackRows:
    """Rows of train or score packs, which attend only within their samples: G packs of L rows, flattened.

    Attributes:
        tokens, targets, positions, segments: [G * L]; segment -1 is padding.
    """

    tokens: Int[Array, " T"]
    targets: Int[Array, " T"]
    positions: Int[Array, " T"]
    segments: Int[Array, " T"]


@struct.dataclass
class TrainRows:
    """Training packs: their rows, and what only the backward needs.

    Attributes:
        rows: The packs' rows.
        weights: [G * L] loss weight of each target, 0 without a target.
        pages: [G, MP] pages of the pack's adapter, 0 = none.
        grad_pages: [G, MP] pages of the gradient pool, 0 = the trash page.
        drop_keys: [G * L] hash of (job seed, optimizer step, sample, position).
        drop_rates: [G] LoRA dropout rate.
    """

    rows: PackRows
    weights: Float[Array, " T"]
    pages: Int[Array, "G MP"]
    grad_pages: Int[Array, "G MP"]
    drop_keys: UInt[Array, " T"]
    drop_rates: Float[Array, " G"]


@struct.dataclass
class PrefillRows:
    """Prompt chunks; each is a contiguous row range that starts on a BLOCK boundary.

    Attributes:
        tokens, positions: [rows].
        kv_page, kv_offset: [rows] where the row's key and value are written; page 0 is the trash page.
        plan: Attention plan in blocks of BLOCK rows.
        last_row: [C] row of each chunk's last token, relative to the first prefill row.
    """

    tokens: Int[Array, " rows"]
    positions: Int[Array, " rows"]
    kv_page: Int[Array, " rows"]
    kv_offset: Int[Array, " rows"]
    plan: AttentionPlan
    last_row: Int[Array, " C"]


@struct.dataclass
class DecodeRows:
    """One token of each decoding sequence; the token id itself stays on the device, in the slot.

    Attributes:
        slots: [B] slot of the sequence; the trash slot for padding.
        positions, kv_page, kv_offset: [B] as for prefill.
        plan: Attention plan in blocks of one row.
    """

    slots: Int[Array, " B"]
    positions: Int[Array, " B"]
    kv_page: Int[Array, " B"]
    kv_offset: Int[Array, " B"]
    plan: AttentionPlan


@struct.dataclass
class SampleRows:
    """Per-row sampling parameters: the decode rows, then the chunks. n = bucket.samples.

    Input of the sampler, along with hidden states; not part of a SegmentBatch.

    Attributes:
        slots: [n] slot that receives the token; the trash slot where nothing is sampled.
        index: [n] number of tokens the request has produced; the token's random key depends on (seed, index).
        temperature ... frequency_penalty: [n] with vLLM's semantics; neutral values for padding.
        bias_ids, bias: [n, NB] logit_bias; id -1 = unused.
        banned_ids: [n, NS] ids that may not be sampled yet (min_tokens); -1 = unused.
    """

    slots: Int[Array, " n"]
    index: Int[Array, " n"]
    seed: UInt[Array, " n"]
    temperature: Float[Array, " n"]
    top_k: Int[Array, " n"]
    top_p: Float[Array, " n"]
    min_p: Float[Array, " n"]
    repetition_penalty: Float[Array, " n"]
    presence_penalty: Float[Array, " n"]
    frequency_penalty: Float[Array, " n"]
    bias_ids: Int[Array, "n NB"]
    bias: Float[Array, "n NB"]
    banned_ids: Int[Array, "n NS"]


@struct.dataclass
class SegmentBatch:
    """All rows of one step; a part is None when the bucket has no such rows."""

    lora: SmlmPlan
    train: TrainRows | None = None
    score: PackRows | None = None
    prefill: PrefillRows | None = None
    decode: DecodeRows | None = None


MAX_BANNED = 16  # maximum end-of-sequence and stop ids of a request with min_tokens


def num_tiles(bucket: Bucket) -> int:
    """Number of LoRA tiles that suffices for any mix of adapters in the bucket.

    Packs and chunks start on tile boundaries, so only decode rows may need one tile each.
    """
    return (bucket.train_rows + bucket.score_rows + bucket.prefill) // BLOCK + bucket.decode


def num_wide(bucket: Bucket) -> int:
    """Number of wide LoRA tiles that suffices, as tight as possible: unused ones still launch a program."""
    rows = (bucket.train_rows, bucket.score_rows, bucket.prefill, bucket.decode)
    return num_wide_bound(rows, (bucket.packs, bucket.score_packs, bucket.chunks, bucket.decode))


def _i32(*shape: int, fill: int = 0) -> np.ndarray:
    return np.full(shape, fill, np.int32)


def _f32(*shape: int, fill: float = 0.0) -> np.ndarray:
    return np.full(shape, fill, np.float32)


def empty_batch(bucket: Bucket, cfg: EngineConfig) -> SegmentBatch:
    """A numpy batch of padding only, in the shapes of `bucket`, for `pack_step` to fill."""
    plan = plan_shapes(bucket.rows, num_tiles(bucket), cfg.max_lora_pages, num_wide(bucket))
    return SegmentBatch(
        lora=jax.tree.map(lambda s: np.zeros(s.shape, np.int32), plan),
        train=_empty_train(bucket, cfg) if bucket.packs else None,
        score=_empty_packs(bucket.score_rows) if bucket.score_rows else None,
        prefill=_empty_prefill(bucket, cfg) if bucket.prefill else None,
        decode=_empty_decode(bucket, cfg) if bucket.decode else None,
    )


def _empty_packs(rows: int) -> PackRows:
    return PackRows(tokens=_i32(rows), targets=_i32(rows), positions=_i32(rows), segments=_i32(rows, fill=-1))


def _empty_train(bucket: Bucket, cfg: EngineConfig) -> TrainRows:
    return TrainRows(
        rows=_empty_packs(bucket.train_rows),
        weights=_f32(bucket.train_rows),
        pages=_i32(bucket.packs, cfg.max_lora_pages),
        grad_pages=_i32(bucket.packs, cfg.max_lora_pages),
        drop_keys=np.zeros(bucket.train_rows, np.uint32),
        drop_rates=_f32(bucket.packs),
    )


def _empty_attention(blocks: int, sequences: int, columns: int) -> AttentionPlan:
    return AttentionPlan(
        block_seq=_i32(blocks),
        block_pos=_i32(blocks),
        block_len=_i32(blocks),
        tables=_i32(sequences, columns),
    )


def _empty_prefill(bucket: Bucket, cfg: EngineConfig) -> PrefillRows:
    return PrefillRows(
        tokens=_i32(bucket.prefill),
        positions=_i32(bucket.prefill),
        kv_page=_i32(bucket.prefill),
        kv_offset=_i32(bucket.prefill),
        plan=_empty_attention(bucket.prefill // BLOCK, bucket.chunks, cfg.table_columns(bucket)),
        last_row=_i32(bucket.chunks),
    )


def _empty_decode(bucket: Bucket, cfg: EngineConfig) -> DecodeRows:
    return DecodeRows(
        slots=_i32(bucket.decode, fill=cfg.max_num_seqs),  # the trash slot
        positions=_i32(bucket.decode),
        kv_page=_i32(bucket.decode),
        kv_offset=_i32(bucket.decode),
        plan=_empty_attention(bucket.decode, bucket.decode, cfg.table_columns(bucket)),
    )


def empty_sample(n: int, cfg: EngineConfig) -> SampleRows:
    """`n` numpy rows that sample nothing, for `pack_step` to fill."""
    return SampleRows(
        slots=_i32(n, fill=cfg.max_num_seqs),
        index=_i32(n),
        seed=np.zeros(n, np.uint32),
        temperature=_f32(n),
        top_k=_i32(n),
        top_p=_f32(n, fill=1.0),
        min_p=_f32(n),
        repetition_penalty=_f32(n, fill=1.0),
        presence_penalty=_f32(n),
        frequency_penalty=_f32(n),
        bias_ids=_i32(n, cfg.max_logit_bias, fill=-1),
        bias=_f32(n, cfg.max_logit_bias),
        banned_ids=_i32(n, MAX_BANNED, fill=-1),
    )


def shapes_of(tree: Any) -> Any:
    """`tree` with every leaf replaced by its ShapeDtypeStruct."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def ravel(tree: Any) -> np.ndarray:
    """Flattens all leaves (4-byte numpy arrays) into one int32 buffer, to make one host-to-device copy per step."""
    return np.concatenate(
        [np.ascontiguousarray(leaf).view(np.int32).ravel() for leaf in jax.tree.leaves(tree)]
    )


def unravel(template: Any, flat: Int[Array, " N"]) -> Any:
    """The inverse of `ravel`, for use inside jit; `template` gives shapes and dtypes."""
    leaves, tree = jax.tree.flatten(template)
    out, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        piece = flat[start : start + size].reshape(leaf.shape)
        out.append(piece if leaf.dtype == np.int32 else jax.lax.bitcast_convert_type(piece, leaf.dtype))
        start += size
    return jax.tree.unflatten(tree, out)


def host_tree_size(tree: Any) -> int:
    """Length of the buffer that `ravel(tree)` returns."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def positions_of(batch: SegmentBatch) -> Int[Array, " T"]:
    """Positions of all rows, in flat order."""
    parts = [
        batch.train.rows.positions if batch.train else None,
        batch.score.positions if batch.score else None,
        batch.prefill.positions if batch.prefill else None,
        batch.decode.positions if batch.decode else None,
    ]
    return jnp.concatenate([p for p in parts if p is not None])
