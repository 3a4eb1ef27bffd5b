"""Multiple-choice questions made from held-out text: no download, no annotation.

What a small model can know of a text: which word comes next, and in which order two
stretches follow each other. Questions are drawn with a seed; ``choose`` asks them.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence

from jaxllm.evaluate.choice import Question

WORD = re.compile(r"(?<=[\s(.,])[A-Za-z_]{3,}")
SENTENCE = re.compile(r"[^.!?\s][^.!?]*[.!?]+[\"']?")
LINE = re.compile(r"[^\n]*\S[^\n]*")


def next_words(
    texts: Sequence[str], context: int = 160, choices: int = 4, seed: int = 0
) -> Iterator[Question]:
    """Which word comes next? Endless; the others are drawn as words occur in the texts.

    ``context`` is the number of characters in front of the word at most.

    Raises:
      ValueError: Fewer than two choices, or the texts have too few words.
    """
    places = [(text, found) for text in texts for found in WORD.finditer(text)]
    if not 2 <= choices <= len({found[0] for _, found in places}):
        raise ValueError(f"{choices} choices; accepted: 2 to the words of the texts")
    chance = random.Random(seed)
    while True:
        text, found = chance.choice(places)
        options = {found[0]: None}  # in the order of drawing: the right one first
        while len(options) < choices:
            options.setdefault(chance.choice(places)[1][0])
        before = text[: found.start()][-context:]
        yield _question(before, list(options), chance)


def orders(
    texts: Sequence[str],
    context: int = 160,
    unit: re.Pattern = SENTENCE,
    joint: str = " ",
    seed: int = 0,
) -> Iterator[Question]:
    """Which of two stretches (``SENTENCE`` or ``LINE``) comes first? Endless.

    Both choices are the same two stretches with ``joint`` between them.

    Raises:
      ValueError: No text has three different stretches.
    """
    places = [
        (text, a, b)
        for text in texts
        for a, b in itertools.pairwise(unit.finditer(text))
        if a.start() and a[0] != b[0]
    ]
    if not places:
        raise ValueError("no text has three different stretches to put in order")
    chance = random.Random(seed)
    while True:
        text, a, b = chance.choice(places)
        options = [a[0] + joint + b[0], b[0] + joint + a[0]]
        yield _question(text[: a.start()][-context:], options, chance)


def _question(before: str, options: list[str], chance: random.Random) -> Question:
    """The options, shuffled, after a text; the first is right."""
    order = chance.sample(range(len(options)), len(options))
    return Question(tuple((before, options[i]) for i in order), order.index(0))
