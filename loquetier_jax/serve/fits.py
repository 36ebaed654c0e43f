"""Whether an engine can run a request at all, before anything is queued."""

from loquetier_jax.batch.rows import MAX_BANNED
from loquetier_jax.config import EngineConfig
from loquetier_jax.errors import RequestError
from loquetier_jax.models.spec import DecoderSpec
from loquetier_jax.sampling_params import refuse
from loquetier_jax.schedule.admission import decode_limit
from loquetier_jax.serve.kv import KVPages
from loquetier_jax.serve.request import Request


def check_fits(request: Request, cfg: EngineConfig, spec: DecoderSpec, kv: KVPages, score_rows: int) -> None:
    """Refuses a request that would wait for ever.

    Args:
        request: Any of the completions of its prompt.
        cfg, spec: Of the engine.
        kv: Its KV pages.
        score_rows: Rows of its largest score pack.

    Raises:
        RequestError: names the argument that does not fit.
    """
    params = request.params
    pages, room = kv.pages_for(request.num_tokens), kv.num_pages
    refuse(pages <= room, "prompt", f"{request.num_tokens} tokens with max_tokens ({pages} KV pages)", f"<= {room}")
    params.check(
        vocab_size=spec.vocab_size, max_logprobs=cfg.max_logprobs, max_logit_bias=cfg.max_logit_bias
    )
    held = len(request.stop_ids) if params.min_tokens else 0
    refuse(held <= MAX_BANNED, "stop_token_ids", f"{held} ids with min_tokens", f"<= {MAX_BANNED}")
    always = tuple(b for b in cfg.buckets if not b.packs)
    expected = "prefill and decode rows in buckets without training packs"
    refuse(decode_limit(always) > 0, "buckets", [b.name for b in always], expected)
    if params.prompt_logprobs is not None and len(request.prompt_ids) - 1 > score_rows:
        raise RequestError(
            f"prompt_logprobs: got a prompt of {len(request.prompt_ids)} tokens, expected at most "
            f"{score_rows + 1} (the largest score bucket)"
        )
