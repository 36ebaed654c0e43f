"""A job's accumulators keep the names that they have in checkpoints."""

import jax
import numpy as np

from loquetier_jax.adapters.pages import AdapterPages, pages_of
from loquetier_jax.train.job_state import JobState, stored_pages
from tests.adapters.cases import MIXED, SPEC, random_weights


def test_the_accumulators_of_a_checkpoint() -> None:
    pages = pages_of(random_weights(MIXED), MIXED, SPEC, np.float32)
    stored = stored_pages(pages)
    named = {jax.tree_util.keystr(path, simple=True, separator="|"): a for path, a in jax.tree.leaves_with_path(stored)}
    assert len(named) == SPEC.num_hidden_layers * 4 * 2
    assert named["0|qkv_proj|0"] is pages.layers[0]["qkv_proj"].A
    assert named["1|down_proj|1"] is pages.layers[1]["down_proj"].B
    back = JobState({"grads": stored}, {}).grads
    assert isinstance(back, AdapterPages)
    jax.tree.map(np.testing.assert_array_equal, back, pages)
