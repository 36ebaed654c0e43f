"""Generate: a batch, a chat, a stream, several completions, log-probabilities; adapters if you name some.

python examples/01_generate.py
python examples/01_generate.py pirate=demo/pirate json=demo/json      # after `loquetier demo`
"""

import sys

from loquetier_jax import Engine, SamplingParams
from loquetier_jax.config import Bucket
from loquetier_jax.tiny import base_path

# Every shape that will ever run is in this list: nothing compiles after the start. The score rows are for
# log_probs().
BUCKETS = (
    Bucket(prefill=48, chunks=3, decode=16),
    Bucket(score_packs=1, score_tokens=128, prefill=48, chunks=3, decode=16),
)


def main(adapters: dict[str, str]) -> None:
    """Runs the example; `adapters` are PEFT folders by name."""
    engine = Engine.from_pretrained(base_path(), config="demo", buckets=BUCKETS)
    greedy = SamplingParams(temperature=0, max_tokens=32, stop="\n")

    print("== a batch: prompts of any length, all in the same steps")
    prompts = ["Q: What does the owl eat?\nA:", "count: 3 4 5 6", "reverse: lamp ->", "27 + 45 ="]
    for output in engine.generate(prompts, params=greedy):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

    print("== a chat, through the model's own template")
    chat = [{"role": "user", "content": "Where does the bear live?"}]
    print(engine.generate([chat], params=greedy)[0].outputs[0].text)

    print("== a stream")
    for piece in engine.stream("Q: What color is the lion?\nA:", params=greedy):
        print(piece.text, end="", flush=True)
    print()

    print("== three completions of one prompt; the same seed gives the same three wherever they are batched")
    warm = SamplingParams(n=3, temperature=0.8, top_p=0.95, seed=7, max_tokens=24, logprobs=1, stop="\n")
    for completion in engine.generate("One day", params=warm)[0].outputs:
        print(f"{completion.cumulative_logprob:8.2f}  {completion.text!r}")

    print("== log-probabilities of given texts, by the training forward's own code")
    for text in ("The owl eats mice.", "The owl eats soup."):
        print(f"{float(engine.log_probs([text])[0].sum()):8.2f}  {text}")

    for name, path in adapters.items():
        engine.load_adapter(name, path)  # no restart, no recompile
    for name, output in zip(adapters, engine.generate([chat] * len(adapters), list(adapters), greedy), strict=True):
        print(f"== {name}: {output.outputs[0].text}")


if __name__ == "__main__":
    main(dict(pair.split("=", 1) for pair in sys.argv[1:]))
