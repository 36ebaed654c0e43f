"""The bare loop: train one adapter and serve two requests in the same steps, without Engine, scheduler or stores.

Everything the engine does is here once, in the open: allocate, pack rows on the host, one forward for everybody, a
backward over the train rows alone, the optimizer on the adapter's own pages. `loquetier_jax.runtime` is this loop
with queues.

    python examples/04_bare_loop.py
"""

import jax.numpy as jnp
import numpy as np

from loquetier_jax.adapters.lora import LoraConfig, init_weights, resolve_shape
from loquetier_jax.adapters.pages import pages_of
from loquetier_jax.batch.pack import StepItems, TrainItem, pack_step
from loquetier_jax.batch.rows import ravel
from loquetier_jax.config import Bucket, EngineConfig
from loquetier_jax.models.load import load_hf
from loquetier_jax.sampling_params import SamplingParams
from loquetier_jax.serve.tokenizer import load_tokenizer
from loquetier_jax.step.compiled import StepFunctions, TrainKey
from loquetier_jax.step.state import head_params, new_state
from loquetier_jax.tiny import base_path
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.config import TrainConfig
from loquetier_jax.train.data import load_dataset
from loquetier_jax.train.optimizer import build_optimizer_step, hyperparams, init_state
from loquetier_jax.train.packing import PackStream

PROMPT = "Q: Where does the bear live?\nA:"
GREEDY = SamplingParams(temperature=0, max_tokens=40)
PAGE, GRAD_PAGE = 1, 1  # where the adapter and its gradient live; page 0 is zeros and trash


def main(steps: int = 24) -> None:
    """Runs so many optimizer steps, answering the prompt over and over meanwhile."""
    # Shapes first: one bucket of everything, one pack of 256 train rows, 64 prompt rows, 16 decode rows.
    bucket = Bucket(packs=1, pack_tokens=256, prefill=64, chunks=2, decode=16)
    cfg = EngineConfig(max_model_len=128, max_num_seqs=2, max_adapters=1, max_lora_rank=16, train_pages=1,
                       logit_chunk=128, buckets=(bucket,))  # fmt: skip
    spec, params = load_hf(base_path(), jnp.float32)
    tokenizer = load_tokenizer(base_path())
    state = new_state(spec, cfg, params)  # the device's arrays, each owned here and nowhere else
    functions = StepFunctions(spec, cfg, state)  # compiled functions by shape

    # The adapter: f32 masters at exact rank, and their cast in a page of 16 ranks.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    shape = resolve_shape(lora, spec)
    weights = init_weights(shape, lora, spec, seed=0)
    state.write_adapter([PAGE], pages_of(weights, shape, spec, np.float32))

    # The job: samples, cut into packs by its own data and seed alone; an optimizer whose numbers are state.
    train = TrainConfig(max_steps=steps, learning_rate=5e-3, pack_tokens=256)
    packs = PackStream(load_dataset(dataset("pirate", 256, seed=0), tokenizer, train), train)
    master, opt_state = init_state(weights, train.optim)
    optimizer = build_optimizer_step(spec, shape, train.optim)

    forward, sampler = functions.forward(bucket), functions.sampler(bucket.samples, GREEDY.level)
    key = TrainKey(packs=1, pack_tokens=256, pages=shape.num_pages)
    backward_start = functions.backward_start(key)
    backward = functions.backward_slice(key, 0, spec.num_hidden_layers)

    # Two requests, one on the base and one on the adapter, each with its slot and its pages of the KV cache.
    requests = [Request(tokenizer, 0, (), cfg), Request(tokenizer, 1, (PAGE,), cfg)]
    loss_sum, targets = 0.0, 0
    for pack in packs.iterate():
        # 1. Rows on the host: the pack, and each request's next rows (its prompt, or its last token).
        items = StepItems(train=[TrainItem(pack, (PAGE,), (GRAD_PAGE,))])
        for request in requests:
            request.add_rows(items)
        step = pack_step(items, bucket, cfg)

        # 2. One forward over all rows; base weights are read once. Then the sampler over those that a token is drawn
        #    from: it leaves each in its slot, where the next forward finds it. KV cache and slots are donated.
        out = state.run_forward(forward, jnp.asarray(ravel(step.batch)))
        sampled = state.sample(sampler, out.sample_hidden, jnp.asarray(ravel(step.sample)))

        # 3. Backward over the train rows: from log-probs to the page's gradient, which adds up in the pool.
        flat_train = jnp.asarray(ravel(step.batch.train))
        dx, _ = backward_start(head_params(state.params), out.hidden, out.train["logp"], flat_train, {})
        state.backward(backward, 0, spec.num_hidden_layers, out.kept, dx, flat_train)

        # 4. Results: tokens to their requests, the loss from the log-probs.
        for row, request in step.owners:
            request.take(int(sampled["tokens"][row]))
        loss_sum -= float(np.dot(np.asarray(out.train["logp"]), pack.weights))
        targets += pack.num_targets
        if not pack.is_last:
            continue

        # 5. The optimizer: masters and moments move on, the page gets the new cast, its gradient is zero again.
        numbers = {k: np.float32(v) for k, v in hyperparams(train, pack.step, packs.total_steps).items()}
        master, opt_state, _ = state.apply_optimizer(
            optimizer, master, opt_state, [GRAD_PAGE], [PAGE], np.float32(targets), np.float32(train.max_grad_norm),
            numbers)  # fmt: skip
        print(f"step {pack.step + 1:3}  loss {loss_sum / targets:.3f}")
        loss_sum, targets = 0.0, 0


class Request:
    """A prompt that is asked again as soon as it has been answered; the attributes are what the packer reads."""

    def __init__(self, tokenizer, slot: int, pages: tuple[int, ...], cfg: EngineConfig) -> None:
        self.tokenizer, self.slot, self.adapter_pages = tokenizer, slot, pages
        self.kv_pages = range(1 + slot * cfg.max_pages_per_seq, 1 + (slot + 1) * cfg.max_pages_per_seq)
        self.prompt_ids, self.params, self.seed, self.stop_ids = tokenizer.encode(PROMPT), GREEDY, 0, ()
        self.num_prefilled, self.output = 0, []

    @property
    def num_dispatched(self) -> int:
        return len(self.output)

    def add_rows(self, items: StepItems) -> None:
        """The whole prompt at first, then one row: the token itself is in the slot, on the device."""
        if self.output:
            items.decode.append(self)
        else:
            items.prefill.append((self, len(self.prompt_ids)))

    def take(self, token: int) -> None:
        """The next output token."""
        self.output.append(token)
        if token == self.tokenizer.eos_token_id or len(self.output) == GREEDY.max_tokens:
            text = self.tokenizer.decode(self.output, skip_special_tokens=True)
            print(f"{'adapter' if self.adapter_pages else 'base':>30} {text.strip()}")
            self.output = []


if __name__ == "__main__":
    main()
