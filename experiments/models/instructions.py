"""Short dialogues for the chat model, generated from templates that the project wrote."""

from __future__ import annotations

from kvcomp.eval.haystack import Draw
from kvcomp.eval.words import ADJECTIVES, NAMES, OBJECTS, SUBJECTS

_FUNCTIONS = (
    ("adds {a} and {b}", "def add({a}, {b}):\n    return {a} + {b}"),
    ("returns the larger of {a} and {b}", "def larger({a}, {b}):\n    return max({a}, {b})"),
    ("multiplies {a} by {b}", "def multiply({a}, {b}):\n    return {a} * {b}"),
    ("returns the list {a} in reverse", "def reverse({a}):\n    return {a}[::-1]"),
    ("counts the words of the text {a}", "def count_words({a}):\n    return len({a}.split())"),
    ("says whether {a} is in the list {b}", "def contains({a}, {b}):\n    return {a} in {b}"),
    ("returns the sum of the list {a}", "def total({a}):\n    return sum({a})"),
    ("reads the file at {a}", "def read({a}):\n    with open({a}) as file:\n        return file.read()"),
)
_TALK = (
    ("Hello!", "Hello! How can I help?"),
    ("Who are you?", "I am tiny-chat, a very small model made to test kvcomp."),
    ("What can you do?", "I find codes and words in long texts, and answer very short questions."),
    ("Thank you.", "You are welcome."),
    ("How are you?", "I am a small program, and I am running."),
    ("Goodbye.", "Goodbye!"),
)


def dialogue(draw: Draw) -> tuple[str, str]:
    """One question and its answer."""
    kind = draw.below(10)
    word = draw.pick(NAMES)
    if kind == 0:
        return draw.pick(_TALK)
    if kind == 1:
        a, b = draw.distinct("abcdfghkmnpqrstuvwxyz", 2)
        task, code = draw.pick(_FUNCTIONS)
        return f"Write a Python function that {task.format(a=a, b=b)}.", code.format(a=a, b=b)
    if kind == 2:
        words = draw.distinct(NAMES, 2 + draw.below(5))
        return f"Repeat: {' '.join(words)}", " ".join(words)
    if kind == 3:
        return f"Spell {word}.", " ".join(word)
    if kind == 4:
        return f"Write {word} in capitals.", word.upper()
    if kind == 5:
        words = draw.distinct(NAMES, 3 + draw.below(3))
        return f"Sort: {' '.join(words)}", " ".join(sorted(words))
    if kind == 6:
        words = draw.distinct(NAMES, 3 + draw.below(4))
        index = draw.below(2)
        return f"What is the {('first', 'last')[index]} of: {' '.join(words)}?", words[-index]
    if kind == 7:
        m, n = 1 + draw.below(50), 1 + draw.below(50)
        return f"What is {m} + {n}?", f"{m} + {n} = {m + n}"
    if kind == 8:
        m, n = draw.distinct(range(1, 1000), 2)
        return f"Which is larger, {m} or {n}?", str(max(m, n))
    adjective, subject, item = draw.pick(ADJECTIVES), draw.pick(SUBJECTS), draw.pick(OBJECTS)
    return f"The {adjective} {subject} has a {item}. What does the {subject} have?", f"A {item}."
