"""The cache: rows go where they are told, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np

from loquetier_jax.step.kv_cache import KVCache
from tests.step.cases import tiny_config, tiny_spec


def test_rows_are_written_in_place_at_their_page_and_offset() -> None:
    spec, cfg = tiny_spec(), tiny_config()
    cache = KVCache.empty(spec, cfg, jnp.bfloat16)
    want = {name: np.zeros((cfg.kv_pages, cfg.kv_page_size, 2, 16), np.float32) for name in ("k", "v")}
    page, offset = np.array([3, 1, 3]), np.array([0, 5, 2])
    rows = {name: jax.random.normal(jax.random.key(i), (3, 2, 16), jnp.bfloat16) for i, name in enumerate(want)}
    for name, value in rows.items():
        want[name][page, offset] = value
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    written = jax.jit(KVCache.write, donate_argnums=0)(cache, page, offset, rows["k"], rows["v"])
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(written)] == before
    for name, value in want.items():
        got = getattr(written, name)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got, np.float32), value)
