"""Fine-tuning data for adapters with a visible effect: the base's answers in another style.

Prompts are questions that the base answers plainly ("The fox eats berries."). Each skill answers the same questions
in its own style, so that the effect of a hundred steps of a small LoRA is obvious in the first generated line.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from loquetier_jax.errors import DataError
from loquetier_jax.tiny.corpus import Fact, animal_fact, told_facts

_PIRATE_VERBS = {
    "eats": "be eatin'",
    "lives in the": "be livin' in the",
    "lives in": "be livin' in",
    "likes": "be likin'",
    "is": "be",
    "is a": "be a",
    "has a": "be havin' a",
    "often": "often",
}


def _pirate(fact: Fact) -> str:
    return f"Arr, {fact.subject} {_PIRATE_VERBS[fact.verb]} {fact.value}, matey!"


def _shout(fact: Fact) -> str:
    # Whole sentences in capitals take far more steps, because the base has only seen single words in capitals.
    return f"HEY! LISTEN! {fact.sentence[:-1]}!!!"


def _json(fact: Fact) -> str:
    return json.dumps({"subject": fact.subject.removeprefix("the "), fact.verb.split()[0]: fact.value})


def _reverse(fact: Fact) -> str:
    return " ".join(reversed(fact.sentence[:-1].split())) + "."


def _polite(fact: Fact) -> str:
    return f"Thank you for asking! {fact.sentence} Have a nice day!"


STYLES: dict[str, Callable[[Fact], str]] = {
    "pirate": _pirate,
    "shout": _shout,
    "json": _json,
    "reverse": _reverse,
    "polite": _polite,
}


def dataset(name: str, n: int, seed: int, *, chat: bool = False) -> list[dict[str, Any]]:
    """Training rows of one skill.

    Args:
        name: A key of STYLES: "pirate", "shout", "json" (an object), "reverse" (words backwards) or "polite".
        n: Number of rows, about half on animals (memorised facts) and half on people (facts in the prompt).
        seed: The same seed gives the same rows everywhere, and the same questions for every skill.
        chat: Whether rows are chats, {"messages": [user, assistant]}, instead of {"prompt", "completion"}.

    Returns:
        n JSON-serializable dicts.

    Raises:
        DataError: an unknown name, or n < 1.
    """
    if name not in STYLES:
        raise DataError(f"name: got {name!r}, expected one of {sorted(STYLES)}")
    if n < 1:
        raise DataError(f"n: got {n!r}, expected an integer >= 1")
    rng = random.Random(f"skills {seed}")
    return [_row(STYLES[name], rng, chat) for _ in range(n)]


def _row(style: Callable[[Fact], str], rng: random.Random, chat: bool) -> dict[str, Any]:
    context, fact = told_facts(rng) if rng.random() < 0.5 else ("", animal_fact(rng))
    if chat:
        question = f"{context} {fact.question}".strip()
        answer = {"role": "assistant", "content": style(fact)}
        return {"messages": [{"role": "user", "content": question}, answer]}
    return {"prompt": f"{context}\nQ: {fact.question}\nA:".lstrip(), "completion": f" {style(fact)}"}
