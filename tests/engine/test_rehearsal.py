"""Warm-up measures full steps with contexts and adapters, and leaves no trace of them."""

import jax
import numpy as np
import pytest

from loquetier_jax.batch.pack import StepItems
from loquetier_jax.batch.rows import empty_batch
from loquetier_jax.engine import Engine
from loquetier_jax.runtime.measure import Measurer
from loquetier_jax.runtime.reads import reads_of
from loquetier_jax.runtime.rehearsal import decode_rows, full_step, harmless, prompt_chunk
from loquetier_jax.schedule.latency import FORWARD, LatencyModel, Reads, sampler_run
from tests.engine.engines import random_prompt


def test_a_full_step_fills_its_bucket(tiny_engine: Engine):
    cfg = tiny_engine.cfg
    for bucket in (b for b in cfg.buckets if not b.packs):
        items = full_step(bucket, cfg)
        assert (len(items.decode), len(items.prefill)) == (bucket.decode, bucket.chunks)
        assert sum(n for _, n in items.prefill) <= bucket.prefill
        batch, empty = harmless(items, bucket, cfg), empty_batch(bucket, cfg)
        assert jax.tree.map(np.shape, batch) == jax.tree.map(np.shape, empty)
        for part in filter(None, (batch.prefill, batch.decode)):
            assert not part.kv_page.any(), "a write outside the trash page"
            assert (part.plan.block_len > 0).any() and part.plan.tables.max() < cfg.kv_pages
        assert len({tuple(pages) for pages in batch.lora.tile_pages.tolist() if any(pages)}) > 1, "several adapters"


def test_what_a_step_reads_is_counted(tiny_engine: Engine):
    cfg = tiny_engine.cfg
    items = StepItems(decode=decode_rows(cfg, 3, 20), prefill=[prompt_chunk(cfg, 3, 16, 4), prompt_chunk(cfg, 4, 0, 2)])
    assert reads_of(items) == Reads(kv_tokens=3 * 20, pairs=(17 + 18 + 19 + 20) + (1 + 2))


def test_measuring_changes_nothing_but_the_trash(tiny_engine: Engine):
    engine, latency = tiny_engine, LatencyModel()
    prompts = [random_prompt(np.random.default_rng(0), n) for n in (5, 30)]
    engine.generate(prompts)
    state, before = engine.state, jax.tree.map(np.array, engine.state.kv)
    slots = jax.tree.map(np.array, state.slots)
    measurer = Measurer(engine.functions, state, engine.cfg, latency)
    serving = [b for b in engine.cfg.buckets if not b.packs]
    measurer.attention(serving)
    for bucket in serving:
        measurer.forward(bucket)
        assert latency.known((FORWARD, bucket.name))
    for rows in engine.cfg.sample_sizes:
        measurer.sampler(rows, "full")
        assert latency.known(sampler_run(rows, "full").key)
    assert latency.attention_ms(Reads(1, 1)) >= 0
    pages = jax.tree.map(lambda a: np.asarray(a)[1:], state.kv), jax.tree.map(lambda a: a[1:], before)
    jax.tree.map(np.testing.assert_array_equal, *pages)
    last = engine.cfg.max_num_seqs
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(np.asarray(new)[:last], old[:last]), state.slots, slots)


@pytest.mark.parametrize("context", [1, 16, 17])
def test_a_decode_row_attends_to_as_many_tokens_as_asked(tiny_engine: Engine, context: int):
    [row] = decode_rows(tiny_engine.cfg, 1, context)
    position = len(row.prompt_ids) + row.num_dispatched - 1
    assert position == context - 1 < len(row.kv_pages) * tiny_engine.cfg.kv_page_size
