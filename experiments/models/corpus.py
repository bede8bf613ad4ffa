"""Training sequences: source text, generated tasks and short dialogues, as tokens with a loss weight for each."""

from __future__ import annotations

import lzma
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import instructions
import numpy as np
import package
from kvcomp.eval import tasks
from kvcomp.eval.haystack import Draw

# What a token's error counts, in quarters. The text of a task is hardly predictable and teaches little; its answers
# are few and teach what the model is for.
TEXT_WEIGHT = 4
CONTEXT_WEIGHT = 1
PROMPT_WEIGHT = 0
ANSWER_WEIGHT = 12

# Common and frequent words have one short answer to a long text.
RARE_ANSWER_WEIGHT = 48

# How often each family is drawn, and with how much to find.
_FAMILIES: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("needle_single", 8, (1,)),
    ("needle_multi_key", 6, (4, 8, 16, 16, 24, 32, 32, 48)),
    ("needle_multi_value", 8, (2, 4, 4, 4, 6, 8)),
    ("needle_multi_query", 6, (8, 16, 16, 32)),
    ("variable_tracking", 6, (1, 2, 4, 4, 6, 8)),
    ("common_words", 40, (5,)),
    ("frequent_words", 30, (3,)),
    ("copy", 30, (5,)),
)
_DRAWN = tuple((family, needles) for family, weight, choices in _FAMILIES for needles in choices * weight)


@dataclass(frozen=True)
class Sequences:
    """``tokens`` and ``weights`` (quarters), both (n, length), int16 and uint8."""

    tokens: np.ndarray
    weights: np.ndarray


class Text:
    """The training text: all documents after another as tokens, and its lines for haystacks."""

    def __init__(self, directory: Path, seed: int) -> None:
        documents = lzma.decompress((directory / "train.txt.xz").read_bytes()).split(b"\0")[:-1]
        documents = Draw(f"documents/{seed}").shuffled(documents)
        parts = []
        for document in documents:
            parts.append(np.array([package.BOS], np.int16))
            parts.append(np.frombuffer(document, np.uint8).astype(np.int16))
            parts.append(np.array([package.EOS], np.int16))
        self.tokens = np.concatenate(parts)
        self.bytes = sum(map(len, documents))
        self.lines = [
            line.decode() for document in documents for line in document.split(b"\n") if line.isascii() and line.strip()
        ]


class _Writer:
    """Collects pieces of one sequence until it is full."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens: list[int] = []
        self.weights: list[int] = []

    @property
    def room(self) -> int:
        return self.length - len(self.tokens)

    def add(self, piece: str | bytes | Sequence[int], weight: int) -> None:
        values = piece.encode() if isinstance(piece, str) else piece
        self.tokens.extend(values)
        self.weights.extend([weight] * len(values))

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        self.add([package.PAD] * self.room, 0)
        return np.array(self.tokens[: self.length], np.int16), np.array(self.weights[: self.length], np.uint8)


def _task(draw: Draw, length: int, seed: int, lines: Sequence[str]) -> tasks.Task:
    """A task of a random family with as many questions as fit; half of them hidden in source text."""
    while True:
        family, needles = draw.pick(_DRAWN)
        haystack = None
        if draw.below(2):
            start = draw.below(len(lines) - 400)
            haystack = lines[start : start + 400]
        most = tasks.questions_max(family, needles)
        for questions in dict.fromkeys((most, max(1, most // 2), max(1, most // 4), 1)):
            try:
                return tasks.generate(
                    family,
                    length=length,
                    seed=seed,
                    mode="agnostic",
                    questions=questions,
                    needles=needles,
                    haystack=haystack,
                )
            except ValueError:
                continue


def _answer_weight(task: tasks.Task) -> int:
    return RARE_ANSWER_WEIGHT if task.family in ("common_words", "frequent_words") else ANSWER_WEIGHT


def _text_piece(draw: Draw, size: int, text: np.ndarray) -> np.ndarray:
    start = draw.below(len(text) - size)
    return text[start : start + size]


def base_sequence(draw: Draw, length: int, seed: int, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """One task, alone or after a piece of source text."""
    writer = _Writer(length)
    if length >= package.CONTEXT and draw.below(10) < 3:
        piece = _text_piece(draw, length // 8 + draw.below(length // 2), text.tokens)
        writer.add(piece.tolist(), TEXT_WEIGHT)
        writer.add([package.EOS], TEXT_WEIGHT)
    if draw.below(2):
        writer.add([package.BOS], 0)
    task = _task(draw, writer.room - 1, seed, text.lines)
    writer.add(task.context, CONTEXT_WEIGHT)
    for question in task.questions:
        writer.add(question.prompt, PROMPT_WEIGHT)
        writer.add(question.target, _answer_weight(task))
    writer.add([package.EOS], TEXT_WEIGHT)
    return writer.finish()


def _add_turn(writer: _Writer, user: str, answer: str, weight: int) -> None:
    writer.add([package.USER], 0)
    writer.add(user, 0)
    writer.add([package.END, package.ASSISTANT], 0)
    writer.add(answer, weight)
    writer.add([package.END], weight)


def chat_sequence(draw: Draw, length: int, seed: int, text: Text) -> tuple[np.ndarray, np.ndarray]:
    """Mostly one task as a conversation; else short dialogues after another, or plain source text."""
    writer = _Writer(length)
    kind = draw.below(20)
    if kind < 14:
        if draw.below(10) < 3:
            for _ in range(1 + draw.below(length // 256)):
                _add_turn(writer, *instructions.dialogue(draw), ANSWER_WEIGHT)
        # Every question takes 4 tokens of roles and saves the space and the newline of its target.
        task = _task(draw, writer.room - 128, seed, text.lines)
        before = task.context
        for question in task.questions:
            if writer.room < len(before) + len(question.prompt) + len(question.target) + 4:
                break
            _add_turn(writer, before + question.prompt, question.target.strip(), _answer_weight(task))
            before = ""
    elif kind < 17:
        while writer.room > 256:
            _add_turn(writer, *instructions.dialogue(draw), ANSWER_WEIGHT)
    else:
        writer.add(_text_piece(draw, length, text.tokens).tolist(), TEXT_WEIGHT)
    return writer.finish()


Maker = Callable[[Draw, int, int, Text], tuple[np.ndarray, np.ndarray]]
_shared: tuple[Maker, int, int, Text]


def _start(maker: Maker, length: int, seed: int, text: Text) -> None:
    global _shared
    _shared = maker, length, seed, text


def _one(index: int) -> tuple[np.ndarray, np.ndarray]:
    maker, length, seed, text = _shared
    task_seed = tasks.TRAINING_SEEDS_START + (seed << 32) + index
    return maker(Draw(f"sequence/{maker.__name__}/{length}/{task_seed}"), length, task_seed, text)


def sequences(maker: Maker, count: int, length: int, seed: int, text: Text, workers: int) -> Sequences:
    """``count`` sequences made by ``maker`` in ``workers`` processes; the result does not depend on their number."""
    tokens = np.empty((count, length), np.int16)
    weights = np.empty((count, length), np.uint8)
    with multiprocessing.get_context("fork").Pool(workers, _start, (maker, length, seed, text)) as pool:
        for index, (row, weight) in enumerate(pool.imap(_one, range(count), chunksize=64)):
            tokens[index], weights[index] = row, weight
    return Sequences(tokens, weights)
