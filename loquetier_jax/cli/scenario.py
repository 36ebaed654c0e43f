"""The scenario of `loquetier demo`: two jobs train while four requests stream, with questions before and after."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loquetier_jax.adapters.lora import LoraConfig
from loquetier_jax.cli.options import BASE
from loquetier_jax.timeline import Timeline
from loquetier_jax.tiny.skills import dataset
from loquetier_jax.train.config import TrainConfig

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine
    from loquetier_jax.serve.frontend import RequestHandle
    from loquetier_jax.serve.output import StreamPiece
    from loquetier_jax.train.manager import JobHandle

SKILLS = ("pirate", "shout")
# Asked before and after: two facts that the base has memorised, and one stated in the question.
QUESTIONS = (
    "What color is the lion?",
    "Where does the bear live?",
    "Vera lives in Rome. Hugo is a pilot. What is the job of Hugo?",
)
STREAMED = (
    "What does the fox eat?",
    "Where does the duck live?",
    "What color is the frog?",
    "What does the wolf do at night?",
    "Where does the snake live?",
    "What does the rabbit eat?",
)
MAX_TOKENS = 48
RECORDS, MAX_QUESTION = 1024, 60  # only records with short questions (characters) are used, for faster steps
RANK, ALPHA = 8, 16
PUBLISHES = 3  # during training; the end of a job publishes once more


@dataclass
class Lane:
    """One of the four streams: asks its next question as soon as the last one is answered.

    Attributes:
        title: Shown on the screen.
        adapter: Adapter name; None for the base.
        questions: Asked in turn.
        asked: Number of questions asked so far.
        text: The current or last answer.
        submitted: The current request.
        heard: (version, answer) of every finished answer.
    """

    title: str
    adapter: str | None
    questions: tuple[str, ...]
    asked: int = 0
    text: str = ""
    submitted: "RequestHandle | None" = None
    heard: list[tuple[int | None, str]] = field(default_factory=list)

    @property
    def question(self) -> str:
        """The current question."""
        return self.questions[(self.asked - 1) % len(self.questions)]

    @property
    def version(self) -> int | None:
        """The adapter version that answers."""
        return None if self.submitted is None else self.submitted.requests[0].version

    def turn(self, engine: "Engine", timeline: Timeline, more: bool) -> bool:
        """Records a finished answer and, if `more`, asks the next question; returns whether the lane is busy."""
        if self.submitted is not None and not self.submitted.finished:
            return True
        if self.submitted is not None:
            self.heard.append((self.version, self.text.strip()))
            self.submitted = None
        if not more:
            return False
        self.asked += 1
        self.text = ""
        record = timeline.listener()

        def take(piece: "StreamPiece") -> None:
            self.text += piece.text
            record(piece)

        self.submitted = engine.submit(chat(self.question), self.adapter, sampling(), listener=take)
        return True


@dataclass
class Scenario:
    """One run of the demo.

    Attributes:
        engine: Engine with the embedded base.
        steps: Optimizer steps per job.
        learning_rate, seed: Settings of the jobs.
        timeline: Recording of the run, for the plot.
        jobs, lanes: Jobs by name, and the four streams.
        before, after: Adapter name (or "base") -> answers to QUESTIONS.
    """

    engine: "Engine"
    steps: int
    learning_rate: float
    seed: int
    timeline: Timeline
    jobs: "dict[str, JobHandle]" = field(default_factory=dict)
    lanes: list[Lane] = field(default_factory=list)
    before: dict[str, list[str]] = field(default_factory=dict)
    after: dict[str, list[str]] = field(default_factory=dict)

    def start(self) -> None:
        """Starts the jobs, whose functions compile in the background, and asks the questions meanwhile."""
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        for skill in SKILLS:
            train = TrainConfig(
                max_steps=self.steps,
                learning_rate=self.learning_rate,
                per_device_train_batch_size=8,
                pack_tokens=256,
                seed=self.seed,
            )
            self.jobs[skill] = self.engine.finetune(skill, records(skill, self.seed), lora=lora, train=train)
            self.jobs[skill].pause()  # still compiles; ensures that `before` is asked before the first step
        self.before = self.ask()
        for job in self.jobs.values():
            job.resume()

    def ask(self) -> dict[str, list[str]]:
        """The current answers of the base and both adapters to QUESTIONS."""
        who = [(name, question) for name in (BASE, *SKILLS) for question in QUESTIONS]
        asked = [
            self.engine.submit(
                chat(question), None if name == BASE else name, sampling(), listener=self.timeline.listener()
            )
            for name, question in who
        ]
        self.engine.wait(lambda: all(one.finished for one in asked))
        answers: dict[str, list[str]] = {}
        for (name, _), one in zip(who, asked, strict=True):
            answers.setdefault(name, []).append(one.output().outputs[0].text.strip())
        return answers

    def run(self, show: Callable[["Scenario"], None]) -> None:
        """Streams until both jobs have ended; `show` is called after every iteration."""
        first = SKILLS[0]
        self.lanes = [
            Lane("base only", None, STREAMED),
            *(Lane(f"adapter {skill}", skill, STREAMED) for skill in SKILLS),
            Lane(f"{first}, one question, version by version", first, QUESTIONS[:1]),
        ]
        at = {round(self.steps * i / (PUBLISHES + 1)) for i in range(1, PUBLISHES + 1)} - {0}
        due = {name: sorted(at) for name in self.jobs}

        def done() -> bool:
            for name, job in self.jobs.items():
                self.timeline.watch(job)
                self._publish(job, due[name])
            training = any(job.status in ("queued", "running") for job in self.jobs.values())
            busy = [lane.turn(self.engine, self.timeline, training or self._owes(lane)) for lane in self.lanes]
            show(self)
            return not training and not any(busy)

        self.engine.wait(done)
        for job in self.jobs.values():
            job.wait()
        self.after = self.ask()

    def _owes(self, lane: Lane) -> bool:
        """Whether the version-by-version stream has yet to answer from the last version."""
        if lane is not self.lanes[-1] or not all(job.released for job in self.jobs.values()):
            return lane is self.lanes[-1]
        return all(version != self.engine.adapters.get(lane.adapter).id for version, _ in lane.heard)

    def _publish(self, job: "JobHandle", due: list[int]) -> None:
        if due and job.status == "running" and job.step >= due[0]:
            due.pop(0)
            job.publish()
            self.timeline.mark("dotted: an adapter is published")

    def save(self, folder: Path) -> None:
        """Writes both adapters as PEFT folders."""
        for skill, job in self.jobs.items():
            job.save(folder / skill)

    def as_json(self) -> dict[str, Any]:
        """The results of the demo, as plain data."""
        return {
            "questions": list(QUESTIONS),
            "before": self.before,
            "after": self.after,
            "versions": [{"version": version, "answer": text} for version, text in self.versions()],
            "jobs": {
                name: {"steps": job.step, "loss": [value for _, value in self.timeline.losses[name]]}
                for name, job in self.jobs.items()
            },
            "output_tokens": len(self.timeline.tokens),
            "seconds": self.timeline.now,
        }

    def versions(self) -> list[tuple[int | None, str]]:
        """The first answer of every version, from the stream that always asks the same question."""
        found: dict[int | None, str] = {}
        for version, text in self.lanes[-1].heard:
            found.setdefault(version, text)
        return list(found.items())


def records(skill: str, seed: int) -> list[dict[str, Any]]:
    """Training data of a skill, as chats."""
    rows = dataset(skill, RECORDS, seed, chat=True)
    return [row for row in rows if len(row["messages"][0]["content"]) <= MAX_QUESTION]


def chat(question: str) -> list[dict[str, str]]:
    """A question as a chat."""
    return [{"role": "user", "content": question}]


def sampling() -> Any:
    """Greedy sampling parameters."""
    from loquetier_jax.sampling_params import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
