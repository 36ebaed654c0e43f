"""Generates the pretraining text of the embedded base from a seed: 14 skills, as plain text and as chats.

A skill maps a `random.Random` to one `Exchange`. A document is one or more exchanges, either as plain text
(`prompt + completion`) or as a chat; see `document`. Imports neither jax nor numpy.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loquetier_jax.tiny import words as w
from loquetier_jax.tiny.tokenizer import ASSISTANT, BOS, END, EOS, SYSTEM, USER

CHAT_SHARE = 0.35  # fraction of documents that are chats
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are tiny-llama-bytes.")


@dataclass(frozen=True)
class Exchange:
    """A question and its answer.

    Attributes:
        prompt: The question as plain text, directly followed by the completion.
        completion: The answer, with the leading space of plain text.
        question: The question as phrased by a user in a chat, where the answer is `completion.strip()`.
    """

    prompt: str
    completion: str
    question: str


Skill = Callable[[random.Random], Exchange]


@dataclass(frozen=True)
class Fact:
    """One sentence, `subject verb value.`, and the question it answers.

    Attributes:
        question: As a user asks it.
        subject: In lower case unless it is a name, e.g. "the fox".
        verb: The words between subject and value, e.g. "lives in the".
        value: The last words, e.g. "den".
    """

    question: str
    subject: str
    verb: str
    value: str

    @property
    def sentence(self) -> str:
        return f"{self.subject[0].upper()}{self.subject[1:]} {self.verb} {self.value}."


def animal_fact(rng: random.Random) -> Fact:
    """A fixed fact, to be memorised: what an animal eats, where it lives, its color, its sound."""
    animal = rng.choice(w.ANIMAL_NAMES)
    food, home, color, sound = w.ANIMALS[animal]
    subject = f"the {animal}"
    return rng.choice(
        (
            Fact(f"What does the {animal} eat?", subject, "eats", food),
            Fact(f"Where does the {animal} live?", subject, "lives in the", home),
            Fact(f"What color is the {animal}?", subject, "is", color),
            Fact(f"What does the {animal} do at night?", subject, "often", sound),
        )
    )


def person_fact(rng: random.Random, name: str) -> Fact:
    """A random fact about a person."""
    thing = f"{rng.choice(w.COLORS)} {rng.choice(w.OBJECTS)}"
    return rng.choice(
        (
            Fact(f"Where does {name} live?", name, "lives in", rng.choice(w.CITIES)),
            Fact(f"What does {name} like?", name, "likes", rng.choice(w.FOODS)),
            Fact(f"What is the job of {name}?", name, "is a", rng.choice(w.JOBS)),
            Fact(f"What does {name} have?", name, "has a", thing),
        )
    )


def animal_question(rng: random.Random) -> Exchange:
    """Asks for a memorised fact."""
    fact = animal_fact(rng)
    return Exchange(f"Q: {fact.question}\nA:", f" {fact.sentence}", fact.question)


def told_facts(rng: random.Random) -> tuple[str, Fact]:
    """(a context of one to four facts, the one to ask for)."""
    facts = [person_fact(rng, name) for name in rng.sample(w.NAMES, rng.randint(1, 4))]
    return " ".join(fact.sentence for fact in facts), rng.choice(facts)


def context_question(rng: random.Random) -> Exchange:
    """Asks for one of the facts in a preceding context."""
    context, fact = told_facts(rng)
    prompt = f"{context}\nQ: {fact.question}\nA:"
    return Exchange(prompt, f" {fact.sentence}", f"{context} {fact.question}")


def arithmetic(rng: random.Random) -> Exchange:
    """Sums and differences below 100, products up to 10 x 10."""
    op = rng.choice("++--*")
    top = rng.choice((10, 20, 50, 99))
    a, b = rng.randint(0, top), rng.randint(0, top)
    if op == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
    if op == "-" and b > a:
        a, b = b, a
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    return Exchange(f"{a} {op} {b} =", f" {result}", f"What is {a} {op} {b}?")


def _letters(name: str, change: Callable[[str], str], ask: str) -> Skill:
    def skill(rng: random.Random) -> Exchange:
        word = rng.choice(w.WORDS)
        if rng.random() < 0.5:  # random letters, so that the rule is learned rather than the word list
            word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))
        return Exchange(f"{name}: {word} ->", f" {change(word)}", f"{ask} {word}")

    return skill


def lookup(rng: random.Random) -> Exchange:
    """Looks up one value in a short table."""
    keys = rng.sample(w.OBJECTS, rng.randint(2, 5))
    table = {key: rng.randint(0, 99) for key in keys}
    key = rng.choice(keys)
    text = ", ".join(f"{k}={v}" for k, v in table.items())
    return Exchange(f"table: {text}\nlookup: {key} ->", f" {table[key]}", f"{text}. What is {key}?")


def counting(rng: random.Random) -> Exchange:
    """Continues counting by ones, twos, fives or tens."""
    start, step = rng.randint(0, 60), rng.choice((1, 1, 1, 2, 5, 10))
    run = [str(start + i * step) for i in range(10)]
    head, tail = " ".join(run[:4]), " ".join(run[4:])
    return Exchange(f"count: {head}", f" {tail}", f"Go on: {head}")


def listing(rng: random.Random) -> Exchange:
    """Lists n different things of one kind."""
    kind = rng.choice(tuple(w.LISTS))
    count = rng.randint(2, 5)
    number = w.NUMBER_WORDS[count]
    items = rng.sample(w.LISTS[kind], count)
    body = "".join(f"\n- {item}" for item in items)
    return Exchange(f"{number.capitalize()} {kind}:", body, f"Name {number} {kind}.")


def record(rng: random.Random) -> Exchange:
    """Turns a sentence into JSON."""
    name, age = rng.choice(w.NAMES), rng.randint(5, 90)
    city, job = rng.choice(w.CITIES), rng.choice(w.JOBS)
    data = {"name": name, "age": age, "city": city, "job": job}
    text = f"{name} is {age} years old, lives in {city} and works as a {job}."
    return Exchange(f"{text}\njson:", f" {json.dumps(data)}", f"{text} As json, please.")


def python(rng: random.Random) -> Exchange:
    """Evaluates a call of a one-line function."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    name, args, body, call, value = rng.choice(
        (
            ("add", "a, b", "a + b", f"{a}, {b}", a + b),
            ("sub", "a, b", "a - b", f"{a + b}, {b}", a),
            ("double", "x", "2 * x", f"{a}", 2 * a),
            ("largest", "a, b", "max(a, b)", f"{a}, {b}", max(a, b)),
            ("smallest", "a, b", "min(a, b)", f"{a}, {b}", min(a, b)),
            ("is_even", "n", "n % 2 == 0", f"{a}", a % 2 == 0),
            ("is_big", "n", "n > 10", f"{a}", a > 10),
        )
    )
    code = f"def {name}({args}):\n    return {body}\n\n>>> {name}({call})"
    return Exchange(code, f"\n{value}", code)


def story(rng: random.Random) -> Exchange:
    """A very short story about one animal."""
    animal, name, friend = rng.choice(w.ANIMAL_NAMES), *rng.sample(w.NAMES, 2)
    size, mood, time = rng.choice(w.SIZES), rng.choice(w.MOODS), rng.choice(w.TIMES)
    place, thing = rng.choice(w.PLACES), f"{rng.choice(w.COLORS)} {rng.choice(w.OBJECTS)}"
    food, home = w.ANIMALS[animal][:2]
    middle = [
        f"{time} {name} walked to the {place} and found a {thing}.",
        f"Near the {place} {name} met {friend} the {rng.choice(w.ANIMAL_NAMES)}.",
        f'"Look at this {thing}!" said {name}.',
        f'"Can we share it?" asked {friend}.',
        f"They took the {thing} to the {home}.",
        f"Then they ate {food} together.",
    ]
    kept = [s for s in middle if rng.random() < 0.8] or middle[:1]
    ends = (f"In the end {name} was very {mood}.", f"That night {name} slept well.", "All was well.")
    start = f" Once upon a time there was a {size} {animal} named {name}. {name} loved {food}."
    text = " ".join((start, *kept, rng.choice(ends)))
    return Exchange(f"Story about {name} the {animal}:", text, f"Tell me a story about {name} the {animal}.")


def talk(rng: random.Random) -> Exchange:
    """Greetings and thanks."""
    name = rng.choice(w.NAMES)
    said, answer = rng.choice(
        (
            ("Hello!", "Hello! How can I help you?"),
            (f"Hi, I am {name}.", f"Hello {name}! Nice to meet you."),
            (f"My name is {name}. What is my name?", f"Your name is {name}."),
            ("Who are you?", "I am tiny-llama-bytes, a very small language model."),
            ("Thank you!", "You are welcome."),
            (f"Good night from {name}.", f"Good night, {name}. Sleep well."),
        )
    )
    return Exchange(f"User: {said}\nBot:", f" {answer}", said)


# name -> (skill, relative frequency)
SKILLS: dict[str, tuple[Skill, float]] = {
    "animals": (animal_question, 2.0),
    "context": (context_question, 2.5),
    "arithmetic": (arithmetic, 3.0),
    "copy": (_letters("copy", str, "Copy the word"), 0.7),
    "reverse": (_letters("reverse", lambda x: x[::-1], "Reverse the word"), 1.2),
    "sort": (_letters("sort", lambda x: "".join(sorted(x)), "Sort the letters of"), 1.2),
    "upper": (_letters("upper", str.upper, "Write in capitals:"), 0.7),
    "lookup": (lookup, 1.0),
    "counting": (counting, 0.7),
    "listing": (listing, 0.8),
    "record": (record, 1.2),
    "python": (python, 1.0),
    "story": (story, 3.0),
    "talk": (talk, 0.6),
}
_NAMES = tuple(SKILLS)
_SHARES = tuple(share for _, share in SKILLS.values())


def exchange(rng: random.Random, skill: str) -> Exchange:
    """One exchange of the named skill, a key of SKILLS."""
    return SKILLS[skill][0](rng)


def document(rng: random.Random) -> list[int]:
    """One document as token ids: plain text between <|bos|> and <|eos|>, or a chat of one to three turns.

    Plain text documents may contain several short exchanges, so that few-shot prompts work.
    """
    skill = rng.choices(_NAMES, _SHARES)[0]
    ids = [BOS]
    if rng.random() < CHAT_SHARE:
        if rng.random() < 0.2:
            ids += [SYSTEM, *rng.choice(SYSTEM_PROMPTS).encode(), END]
        for _ in range(rng.choice((1, 1, 2, 3))):
            turn = exchange(rng, skill)
            ids += [USER, *turn.question.encode(), END, ASSISTANT, *turn.completion.strip().encode(), END]
            skill = rng.choices(_NAMES, _SHARES)[0]
        return [*ids, EOS]
    repeats = 1 if skill == "story" else rng.choice((1, 1, 1, 2, 4))
    turns = (exchange(rng, skill) for _ in range(repeats))
    return [*ids, *"\n".join(turn.prompt + turn.completion for turn in turns).encode(), EOS]


def rows(seed: str | int, count: int, length: int) -> Iterator[list[int]]:
    """Yields `count` rows of `length` token ids: concatenated documents, each row starting with a new one.

    Args:
        seed: Any value; the same seed gives the same rows on every machine and Python version >= 3.11.
        count: Number of rows.
        length: Token ids per row; the last document of a row is cut off.
    """
    rng = random.Random(f"tiny-llama-bytes {seed}")
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            row += document(rng)
        yield row[:length]
