"""Generated retrieval tasks: the RULER families, seeded, and the same on every platform and Python version.

After "RULER: What's the Real Context Size of Your Long-Context Language Models?" (Hsieh et al., 2024), made for models
that read bytes: one byte is one token, so every ``length`` here is a number of bytes and, for the shipped models, of
tokens. All text is ASCII.

========================  =========================================================  ==============================
family                    what is asked                                              ``needles`` counts (default)
========================  =========================================================  ==============================
``needle_single``         the number of the one key in the text                      keys (1, always)
``needle_multi_key``      the number of one key among many                           keys (16)
``needle_multi_value``    all four numbers of one key among several                  keys (4)
``needle_multi_query``    the numbers of four keys among many, in one question       keys (16)
``variable_tracking``     every name a number was stored in, over four hops          chains (4)
``common_words``          the words that occur much more often than the others       words asked for (5)
``frequent_words``        the most frequent of words that follow a Zipf law          words asked for (3)
``copy``                  a line of the text, from its first three words             words asked for (5)
========================  =========================================================  ==============================

In mode ``aware`` the one question ends the prompt, so it lies in the window by which a method scores what to keep (no
prompt is longer than ``PROMPT_BYTES_MAX``). In mode ``agnostic`` the context is compressed alone, and then one or
several questions are asked about it, each on the same compressed context.

The prompt of a question follows the context directly, and its target (a space, the answers, a newline) follows the
prompt. Context, prompts and targets together have exactly ``length`` bytes, so questions also fit one after another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .haystack import Draw, filler, place
from .words import NAMES

FAMILIES = (
    "needle_single",
    "needle_multi_key",
    "needle_multi_value",
    "needle_multi_query",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "copy",
)
MODES = ("aware", "agnostic")
PROMPT_BYTES_MAX = 64
# Part of every seed: raised whenever the same arguments would give another text.
TASKS_VERSION = 1
# Training draws its seeds from here upwards; evaluation stays below.
TRAINING_SEEDS_START = 2**40

_VALUES_PER_KEY = 4
_KEYS_PER_QUERY = 4
_HOPS = 4
_COPY_PROMPT_WORDS = 3
_WORDS_PER_LINE = 8
# A word and the space after it: a name, on average and rounded up, and a coined word.
_NAME_BYTES = 1 + -(-sum(map(len, NAMES)) // len(NAMES))
_COINED_BYTES = 7
# How many times a common word occurs for each time that an uncommon one does.
_COMMON_TO_UNCOMMON = 8
_DEFAULT_NEEDLES = {
    "needle_single": 1,
    "needle_multi_key": 16,
    "needle_multi_value": 4,
    "needle_multi_query": 16,
    "variable_tracking": 4,
    "common_words": 5,
    "frequent_words": 3,
    "copy": 5,
}
_NEEDLES_RANGE = {
    "needle_single": (1, 1),
    "needle_multi_key": (1, len(NAMES)),
    "needle_multi_value": (1, len(NAMES)),
    "needle_multi_query": (_KEYS_PER_QUERY, len(NAMES)),
    "variable_tracking": (1, len(NAMES) // (_HOPS + 1)),
    "common_words": (1, 8),
    "frequent_words": (1, 5),
    "copy": (1, 8),
}


@dataclass(frozen=True)
class Question:
    """One question about a context.

    ``prompt`` follows the context directly. ``answers`` are the words or numbers that a right answer has, in their
    natural order; ``ordered`` says whether that order counts. ``target`` is the continuation of the prompt that a
    perfect model writes: it starts with a space and ends with a newline, and its length is all that an answer needs.
    """

    prompt: str
    answers: tuple[str, ...]
    target: str
    ordered: bool = False


@dataclass(frozen=True)
class Task:
    """A context and its questions, with the arguments of :func:`generate` they were made from."""

    family: str
    mode: str
    length: int
    seed: int
    needles: int
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Window:
    """A piece of held-out text: ``context`` is read (and compressed), ``continuation`` is what gets scored."""

    context: str
    continuation: str


def generate(
    family: str,
    *,
    length: int,
    seed: int,
    mode: str = "aware",
    questions: int = 1,
    needles: int | None = None,
    haystack: Sequence[str] | None = None,
) -> Task:
    """One task. The same arguments give the same text everywhere.

    Args:
        family: one of ``FAMILIES``.
        length: bytes of context, prompts and targets together, reached exactly.
        seed: not negative. Evaluation uses seeds below ``TRAINING_SEEDS_START``.
        mode: ``aware`` (exactly one question) or ``agnostic``.
        questions: how many; see ``questions_max``.
        needles: how much there is to find; the table above says what is counted.
        haystack: ASCII lines without newline to hide needles in, taken consecutively from a random start, instead of
            generated sentences. The families made of words alone (common, frequent, copy) do not use it.

    Raises:
        ValueError: an argument is out of its range, or ``length`` is too short for what is asked.
    """
    _expect("family", f"one of {', '.join(FAMILIES)}", family, family in FAMILIES)
    _expect("mode", "'aware' or 'agnostic'", mode, mode in MODES)
    _expect("length", "a positive integer", length, _is_int(length) and length > 0)
    _expect("seed", "an integer >= 0", seed, _is_int(seed) and seed >= 0)
    if needles is None:
        needles = _DEFAULT_NEEDLES[family]
    low, high = _NEEDLES_RANGE[family]
    _expect(
        "needles", f"an integer from {low} to {high} for {family}", needles, _is_int(needles) and low <= needles <= high
    )
    most = 1 if mode == "aware" else questions_max(family, needles)
    _expect(
        "questions",
        f"an integer from 1 to {most} for {family} in mode {mode} with {needles} needles",
        questions,
        _is_int(questions) and 1 <= questions <= most,
    )
    if haystack is not None:
        _expect("haystack", "at least one line", haystack, len(haystack) > 0)
        _expect("haystack", "ASCII lines without newlines", "others", all(_is_line(line) for line in haystack))

    draw = Draw(f"kvcomp.tasks/{TASKS_VERSION}/{family}/{length}/{needles}/{questions}/{seed}")
    if family == "common_words":
        context, asked = _common_words(draw, length, needles)
    elif family == "frequent_words":
        context, asked = _frequent_words(draw, length, needles)
    elif family == "copy":
        context, asked = _copy(draw, length, needles, questions)
    else:
        groups, asked = _NEEDLE_FAMILIES[family](draw, needles, questions)
        room = length - _size(asked) - sum(len(line) for group in groups for line in group)
        _expect_room(family, length, room)
        context = place(draw, filler(draw, room, haystack), groups)
    return Task(family, mode, length, seed, needles, context, asked)


def questions_max(family: str, needles: int | None = None) -> int:
    """The most questions that one ``agnostic`` context of this family has. Raises ValueError for a foreign family."""
    _expect("family", f"one of {', '.join(FAMILIES)}", family, family in FAMILIES)
    if needles is None:
        needles = _DEFAULT_NEEDLES[family]
    if family in ("needle_single", "common_words", "frequent_words"):
        return 1
    if family == "needle_multi_query":
        return needles // _KEYS_PER_QUERY
    if family == "copy":
        return 16
    return needles


def iter_tasks(
    *,
    length: int,
    count: int,
    seed: int = 0,
    families: Sequence[str] = FAMILIES,
    modes: Sequence[str] = MODES,
    questions: int = 4,
    needles: int | None = None,
) -> Iterator[Task]:
    """A fixed evaluation set: ``count`` tasks of every family and mode, of the seeds from ``seed`` on.

    ``questions`` holds for mode ``agnostic``, as far as a family has that many; ``needles`` for all families given.
    """
    _expect("count", "a positive integer", count, _is_int(count) and count > 0)
    _expect("questions", "a positive integer", questions, _is_int(questions) and questions > 0)
    for family in families:
        for mode in modes:
            asked = 1 if mode == "aware" else min(questions, questions_max(family, needles))
            for index in range(count):
                yield generate(family, length=length, seed=seed + index, mode=mode, questions=asked, needles=needles)


def held_out(text: str, *, length: int, count: int, scored: int) -> tuple[Window, ...]:
    """``count`` windows of ``length`` bytes, evenly spread over an ASCII text, without overlap.

    The last ``scored`` bytes of each are the continuation.

    Raises:
        ValueError: the text is not ASCII or shorter than ``count * length``, or a number is out of its range.
    """
    _expect("text", "ASCII text", "others", text.isascii(), operation="held_out")
    _expect("length", "an integer >= 2", length, _is_int(length) and length >= 2, operation="held_out")
    _expect("count", "a positive integer", count, _is_int(count) and count > 0, operation="held_out")
    _expect(
        "scored",
        f"an integer from 1 to {length - 1}",
        scored,
        _is_int(scored) and 1 <= scored < length,
        operation="held_out",
    )
    needed = count * length
    _expect("text", f"at least {needed} bytes", len(text), len(text) >= needed, operation="held_out")
    starts = [index * (len(text) - length) // max(count - 1, 1) for index in range(count)]
    return tuple(
        Window(text[start : start + length - scored], text[start + length - scored : start + length])
        for start in starts
    )


def score(answer_text: str, question: Question) -> float:
    """The fraction of the expected answers that the first line of ``answer_text`` has, in [0, 1].

    Words are compared whole. Only as many as were asked for count, so that listing everything earns nothing; the
    small words of a target ("in") are passed over, and so is a repetition of the prompt.
    """
    line = answer_text.strip().split("\n", 1)[0]
    words = _words(line.removeprefix(question.prompt))
    passed_over = set(_words(question.target)) - set(question.answers)
    words = [word for word in words if word not in passed_over][: len(question.answers)]
    if question.ordered:
        right = sum(word == answer for word, answer in zip(words, question.answers, strict=False))
    else:
        right = len(set(words) & set(question.answers))
    return right / len(question.answers)


def _needle(key: str, value: str) -> str:
    return f"The code of {key} is {value}\n"


def _question(prompt: str, answers: Sequence[str], *, between: str = " ", ordered: bool = False) -> Question:
    return Question(prompt, tuple(answers), f" {between.join(answers)}\n", ordered)


def _multi_key(draw: Draw, needles: int, questions: int) -> tuple[list[list[str]], tuple[Question, ...]]:
    keys, values = draw.distinct(NAMES, needles), draw.numbers(needles)
    asked = draw.distinct(range(needles), questions)
    return (
        [[_needle(key, value)] for key, value in zip(keys, values, strict=True)],
        tuple(_question(f"The code of {keys[i]} is", [values[i]]) for i in asked),
    )


def _multi_value(draw: Draw, needles: int, questions: int) -> tuple[list[list[str]], tuple[Question, ...]]:
    keys = draw.distinct(NAMES, needles)
    numbers = draw.numbers(needles * _VALUES_PER_KEY)
    values = [numbers[i * _VALUES_PER_KEY : (i + 1) * _VALUES_PER_KEY] for i in range(needles)]
    asked = draw.distinct(range(needles), questions)
    return (
        [[_needle(key, value) for value in own] for key, own in zip(keys, values, strict=True)],
        tuple(_question(f"All codes of {keys[i]} are", values[i]) for i in asked),
    )


def _multi_query(draw: Draw, needles: int, questions: int) -> tuple[list[list[str]], tuple[Question, ...]]:
    keys, values = draw.distinct(NAMES, needles), draw.numbers(needles)
    order = draw.shuffled(range(needles))
    asked = []
    for first in range(0, questions * _KEYS_PER_QUERY, _KEYS_PER_QUERY):
        chosen = order[first : first + _KEYS_PER_QUERY]
        asked.append(
            _question(
                f"The codes of {' '.join(keys[i] for i in chosen)} are", [values[i] for i in chosen], ordered=True
            )
        )
    return [[_needle(key, value)] for key, value in zip(keys, values, strict=True)], tuple(asked)


def _variable_tracking(draw: Draw, needles: int, questions: int) -> tuple[list[list[str]], tuple[Question, ...]]:
    names, values = draw.distinct(NAMES, needles * (_HOPS + 1)), draw.numbers(needles)
    chains = [names[i * (_HOPS + 1) : (i + 1) * (_HOPS + 1)] for i in range(needles)]
    asked = draw.distinct(range(needles), questions)
    return (
        [
            [f"Store {held} in {name}\n" for held, name in zip([value, *chain[:-1]], chain, strict=True)]
            for value, chain in zip(values, chains, strict=True)
        ],
        tuple(_question(f"Trace {values[i]} in", chains[i], between=" in ") for i in asked),
    )


_NEEDLE_FAMILIES = {
    "needle_single": _multi_key,
    "needle_multi_key": _multi_key,
    "needle_multi_value": _multi_value,
    "needle_multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}


def _common_words(draw: Draw, length: int, needles: int) -> tuple[str, tuple[Question, ...]]:
    """Each of ``needles`` words takes 1/20 of the places; the others share the rest, evenly and thinly.

    The target has them in the order of their last occurrence, the latest first: what a reader has freshest in mind.
    """
    chosen = draw.shuffled(NAMES)
    common, others = chosen[:needles], chosen[needles:]
    prompt = f"The {needles} most common words are"
    room = length - _size([_question(prompt, common)])
    slots = room // _NAME_BYTES
    _expect_room("common_words", length, room - 60 * _NAME_BYTES)
    often = slots // 20
    seldom = max(1, often // _COMMON_TO_UNCOMMON, -(-(slots - often * needles) // len(others)))
    words = common * often
    left = room - sum(len(word) + 1 for word in words)
    for word in (other for other in others for _ in range(seldom)):
        if len(word) + 1 > left:
            break
        words.append(word)
        left -= len(word) + 1
    words = draw.shuffled(words)
    last_seen = [word for word in dict.fromkeys(reversed(words)) if word in common]
    return _lines(words, room), (_question(prompt, last_seen),)


def _frequent_words(draw: Draw, length: int, needles: int) -> tuple[str, tuple[Question, ...]]:
    """The word of rank r occurs in proportion to 1/r**2; the last ranks occur once."""
    prompt = f"The {needles} most frequent words are"
    room = length - _size([_question(prompt, ["." * (_COINED_BYTES - 1)] * needles)])
    # One occurrence at least must lie between the last word asked for and the next: scale/n² - scale/(n+1)² >= 1.
    scale_needed = (needles * (needles + 1)) ** 2 / (2 * needles + 1)
    _expect_room("frequent_words", length, room - _COINED_BYTES * math.ceil(scale_needed * math.pi**2 / 6))
    slots = room // _COINED_BYTES
    scale = slots / sum(1 / rank**2 for rank in range(1, slots + 1))
    counts = [int(scale / rank**2) for rank in range(1, slots + 1)]
    counts = [count for count in counts if count > 0]
    counts += [1] * (slots - sum(counts))
    vocabulary = draw.coined_words(len(counts))
    words = draw.shuffled([word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)])
    return _lines(words, room), (_question(prompt, vocabulary[:needles]),)


def _copy(draw: Draw, length: int, needles: int, questions: int) -> tuple[str, tuple[Question, ...]]:
    """Lines of random words; those asked about begin with three words that begin no other line."""
    beginnings: set[tuple[str, ...]] = set()

    def new_line() -> list[str]:
        while True:
            line = draw.distinct(NAMES, _COPY_PROMPT_WORDS + needles)
            beginning = tuple(line[:_COPY_PROMPT_WORDS])
            if beginning not in beginnings:
                beginnings.add(beginning)
                return line

    chosen = [new_line() for _ in range(questions)]
    asked = tuple(
        _question(" ".join(line[:_COPY_PROMPT_WORDS]), line[_COPY_PROMPT_WORDS:], ordered=True) for line in chosen
    )
    lines = [" ".join(line) + "\n" for line in chosen]
    left = length - _size(asked) - sum(map(len, lines))
    _expect_room("copy", length, left)
    while True:
        line = " ".join(new_line()) + "\n"
        if len(line) > left:
            return _padding(left) + "".join(draw.shuffled(lines)), asked
        lines.append(line)
        left -= len(line)


def _size(questions: Sequence[Question]) -> int:
    return sum(len(question.prompt) + len(question.target) for question in questions)


def _lines(words: Sequence[str], size: int) -> str:
    """The words in lines of eight, after padding to ``size`` bytes."""
    text = "".join(
        word + ("\n" if i % _WORDS_PER_LINE == _WORDS_PER_LINE - 1 or i == len(words) - 1 else " ")
        for i, word in enumerate(words)
    )
    return _padding(size - len(text)) + text


def _padding(size: int) -> str:
    """A line of dots of ``size`` bytes."""
    return "." * (size - 1) + "\n" if size > 0 else ""


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9]+", text)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_line(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and "\n" not in value


def _expect(argument: str, expected: str, got: object, holds: bool, *, operation: str = "generate") -> None:
    if not holds:
        raise ValueError(f"tasks.{operation}: {argument}: expected {expected}, got {got!r}")


def _expect_room(family: str, length: int, room: int) -> None:
    """Raises unless ``room``, the bytes left over after all that ``length`` must hold, is at least 0."""
    _expect("length", f"at least {length - room} bytes for {family} with what is asked", length, room >= 0)
