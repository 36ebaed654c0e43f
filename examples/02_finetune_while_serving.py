"""Fine-tuning while serving: requests stream through the steps that train an adapter, and use what it publishes.

python examples/02_finetune_while_serving.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from loquetier_jax import Engine, LoraConfig, SamplingParams, TrainConfig
from loquetier_jax.tiny import base_path
from loquetier_jax.tiny.skills import dataset

QUESTION = [{"role": "user", "content": "Where does the bear live?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


def main(steps: int = 16) -> None:
    """Runs the example with `steps` optimizer steps."""
    engine = Engine.from_pretrained(base_path(), config="demo")

    # Returns once data and settings are checked; the training step compiles in the background.
    job = engine.finetune(
        "shout",
        dataset("shout", 256, seed=0, chat=True),  # or the path of a JSON-lines file
        lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        train=TrainConfig(max_steps=steps, learning_rate=5e-3, pack_tokens=256),
    )

    # Waiting for tokens drives the loop, and the job trains in the same steps. The adapter can be used from the
    # start: first untrained, then as last published.
    answers = 0
    while job.status in ("queued", "running"):
        for piece in engine.stream(QUESTION, adapter="shout", params=GREEDY):
            print(piece.text, end="", flush=True)
        answers += 1
        print(f"   [answer {answers}, step {job.step}/{job.total_steps}]")
        if job.step and job.status == "running":
            job.publish()  # the next request sees these weights; copies nothing
    job.wait()
    losses = [line["loss"] for line in job.metrics]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    # The result is served under its name, alongside the base, and is an ordinary PEFT adapter on disk.
    with TemporaryDirectory() as folder:
        job.save(Path(folder) / "shout")
        engine.load_adapter("from-disk", Path(folder) / "shout")
        who = [None, "shout", "from-disk"]
        for name, output in zip(who, engine.generate([QUESTION] * 3, who, GREEDY), strict=True):
            print(f"{name or 'base':10} {output.outputs[0].text}")


if __name__ == "__main__":
    main()
