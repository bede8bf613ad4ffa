"""The generated tasks, their export, and the two shipped models that are measured on them."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcomp.eval import tasks
from kvcomp.eval.lm_eval_tasks import export_lm_eval, process_results
from kvcomp.eval.words import NAMES

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
MODELS = EXPERIMENTS / "models"
HELD_OUT = EXPERIMENTS / "data" / "held_out.txt"
LONG_ENOUGH = 2048

GOLDEN = {
    "needle_single": "8facb5389459f374",
    "needle_multi_key": "7f4ab288f9c84c69",
    "needle_multi_value": "240d369b2dd3a4de",
    "needle_multi_query": "257f822bbc49dc32",
    "variable_tracking": "8fd6b42d279c7c8e",
    "common_words": "675f0dd865be55ef",
    "frequent_words": "29efccfcd4638713",
    "copy": "057e1263d6fb8246",
}


def digest(task: tasks.Task) -> str:
    text = json.dumps([task.context, [[q.prompt, q.answers, q.target, q.ordered] for q in task.questions]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def size(task: tasks.Task) -> int:
    return len(task.context) + sum(len(question.prompt) + len(question.target) for question in task.questions)


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_the_text_is_the_same_everywhere(family: str) -> None:
    asked = tasks.questions_max(family)
    task = tasks.generate(family, length=LONG_ENOUGH, seed=7, mode="agnostic", questions=asked)
    assert digest(task) == GOLDEN[family]


def test_importing_the_tasks_needs_no_torch() -> None:
    code = "import sys, kvcomp.eval.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(tasks.FAMILIES),
    st.integers(LONG_ENOUGH, 9000),
    st.integers(0, 2**41),
    st.data(),
)
def test_every_task_is_exact_and_solvable(family: str, length: int, seed: int, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(tasks.MODES))
    questions = 1 if mode == "aware" else data.draw(st.integers(1, tasks.questions_max(family)))
    task = tasks.generate(family, length=length, seed=seed, mode=mode, questions=questions)
    assert size(task) == length
    assert len(task.questions) == questions
    assert len({question.prompt for question in task.questions}) == questions
    assert task.context.isascii() and task.context.endswith("\n")
    for question in task.questions:
        assert len(question.prompt) <= tasks.PROMPT_BYTES_MAX
        assert question.target[0] == " " and question.target[-1] == "\n"
        assert tasks.score(question.target, question) == 1.0
        words = set(re.findall(r"\w+", task.context))
        assert words.issuperset(question.answers)


def test_needles_stand_in_the_text_as_asked() -> None:
    for seed in range(5):
        for family in ("needle_single", "needle_multi_key"):
            (question,) = tasks.generate(family, length=1200, seed=seed).questions
            context = tasks.generate(family, length=1200, seed=seed).context
            assert re.findall(f"^{question.prompt} (\\d+)$", context, re.M) == list(question.answers)
        task = tasks.generate("needle_multi_value", length=1200, seed=seed)
        key = task.questions[0].prompt.split()[3]
        found = re.findall(f"^The code of {key} is (\\d+)$", task.context, re.M)
        assert found == list(task.questions[0].answers) and len(found) == 4
        task = tasks.generate("needle_multi_query", length=1200, seed=seed)
        facts = dict(re.findall(r"^The code of (\w+) is (\d+)$", task.context, re.M))
        assert [facts[key] for key in task.questions[0].prompt.split()[3:-1]] == list(task.questions[0].answers)
        assert len(facts) == 16


def test_variables_are_stored_in_order_along_the_chain() -> None:
    task = tasks.generate("variable_tracking", length=2000, seed=3, mode="agnostic", questions=4)
    for question in task.questions:
        held, at = question.prompt.split()[1], 0
        for name in question.answers:
            at = task.context.index(f"Store {held} in {name}\n", at)
            held = name
        assert f"Store {held} in " not in task.context


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
def test_common_and_frequent_words_are_so_by_counting(length: int) -> None:
    task = tasks.generate("common_words", length=length, seed=1)
    counts = Counter(re.findall(r"\w+", task.context))
    common = [counts[word] for word in task.questions[0].answers]
    others = [count for word, count in counts.items() if word not in task.questions[0].answers]
    assert min(common) >= 3 * max(others) or length < 600
    assert min(common) > max(others)
    task = tasks.generate("frequent_words", length=length, seed=1)
    ranked = Counter(re.findall(r"\w+", task.context)).most_common(4)
    assert [word for word, _ in ranked[:3]] == list(task.questions[0].answers)
    assert ranked[2][1] > ranked[3][1]


def test_a_copied_line_has_one_beginning() -> None:
    task = tasks.generate("copy", length=4096, seed=1, mode="agnostic", questions=8)
    for question in task.questions:
        assert task.context.count(question.prompt + question.target) == 1
        assert sum(line.startswith(question.prompt + " ") for line in task.context.splitlines()) == 1


def test_arguments_change_the_text_and_the_mode_alone_does_not() -> None:
    first = tasks.generate("needle_multi_key", length=2048, seed=1)
    assert first == tasks.generate("needle_multi_key", length=2048, seed=1)
    assert first.context != tasks.generate("needle_multi_key", length=2048, seed=2).context
    assert first.context == tasks.generate("needle_multi_key", length=2048, seed=1, mode="agnostic").context
    more = tasks.generate("needle_multi_key", length=4096, seed=1, needles=32)
    assert more.context.count("The code of") == 32


def test_needles_hide_in_lines_handed_in() -> None:
    lines = [f"line {index} of the text" for index in range(50)]
    task = tasks.generate("needle_multi_key", length=1500, seed=1, haystack=lines)
    others = [line for line in task.context.splitlines() if not line.startswith("The code of")]
    assert all(line in lines for line in others[:-1]) and lines[0].startswith(others[-1][:4])
    numbers = [int(line.split()[1]) for line in others[:-1]]
    assert all((b - a) % 50 == 1 for a, b in itertools.pairwise(numbers))


QUESTION = tasks.Question("The codes of a b are", ("1234567", "7654321"), " 1234567 7654321\n", ordered=True)
UNORDERED = tasks.Question("Trace 5 in", ("apple", "pear", "plum"), " apple in pear in plum\n")


@pytest.mark.parametrize(
    ("answer", "question", "expected"),
    [
        (" 1234567 7654321\nand more 1", QUESTION, 1.0),
        ("1234567, 7654321.", QUESTION, 1.0),
        ("The codes of a b are 1234567 7654321", QUESTION, 1.0),
        (" 7654321 1234567", QUESTION, 0.0),
        (" 1234567 1234567", QUESTION, 0.5),
        (" 12345678 7654321", QUESTION, 0.5),
        ("", QUESTION, 0.0),
        ("\n\n 1234567 7654321", QUESTION, 1.0),
        (" apple in pear in plum", UNORDERED, 1.0),
        (" plum apple pear", UNORDERED, 1.0),
        (" apple in apple in apple", UNORDERED, 1 / 3),
        (" fig apple pear plum", UNORDERED, 2 / 3),
        (" Apple in pears", UNORDERED, 0.0),
    ],
)
def test_score(answer: str, question: tasks.Question, expected: float) -> None:
    assert tasks.score(answer, question) == pytest.approx(expected)


GOOD = {"family": "needle_multi_key", "length": 2048, "seed": 0}


@pytest.mark.parametrize(
    ("changed", "argument"),
    [
        ({"family": "needle"}, "family"),
        ({"mode": "blind"}, "mode"),
        ({"length": 0}, "length"),
        ({"length": 100}, "length"),
        ({"length": 2048.0}, "length"),
        ({"length": True}, "length"),
        ({"seed": -1}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"needles": 0}, "needles"),
        ({"needles": len(NAMES) + 1}, "needles"),
        ({"family": "needle_single", "needles": 2}, "needles"),
        ({"questions": 2}, "questions"),
        ({"mode": "agnostic", "questions": 17}, "questions"),
        ({"mode": "agnostic", "questions": 0}, "questions"),
        ({"haystack": []}, "haystack"),
        ({"haystack": ["ä"]}, "haystack"),
        ({"haystack": ["a\n"]}, "haystack"),
        ({"family": "common_words", "length": 300}, "length"),
        ({"family": "frequent_words", "length": 200}, "length"),
        ({"family": "copy", "length": 60}, "length"),
    ],
)
def test_a_bad_argument_is_named_in_one_sentence(changed: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^tasks\.generate: {argument}: expected [^\n]+, got [^\n]+$"):
        tasks.generate(**(GOOD | changed))


def test_the_shortest_length_named_is_enough() -> None:
    for family in tasks.FAMILIES:
        with pytest.raises(ValueError, match="at least") as caught:
            tasks.generate(family, length=50, seed=0)
        least = int(re.search(r"at least (\d+)", str(caught.value))[1])
        # Another length draws other words: theirs may be up to two letters a word longer.
        assert size(tasks.generate(family, length=least + 100, seed=0)) == least + 100


def test_an_evaluation_set_is_fixed_and_apart_from_training() -> None:
    made = list(tasks.iter_tasks(length=2048, count=2, seed=5, questions=3))
    assert len(made) == len(tasks.FAMILIES) * 2 * 2
    assert {task.seed for task in made} == {5, 6}
    assert all(task.seed < tasks.TRAINING_SEEDS_START for task in made)
    for task in made:
        assert len(task.questions) == (1 if task.mode == "aware" else min(3, tasks.questions_max(task.family)))
    with pytest.raises(ValueError, match="count"):
        next(tasks.iter_tasks(length=2048, count=0))


def test_held_out_windows() -> None:
    text = HELD_OUT.read_text("ascii")
    windows = tasks.held_out(text, length=4096, count=20, scored=1000)
    starts = [text.index(window.context) for window in windows]
    assert all(len(window.context) == 3096 and len(window.continuation) == 1000 for window in windows)
    assert all(b - a >= 4096 for a, b in itertools.pairwise(starts))
    assert starts[0] == 0 and starts[-1] == len(text) - 4096
    for window, start in zip(windows, starts, strict=True):
        assert text[start + 3096 : start + 4096] == window.continuation
    for bad in ({"count": 100}, {"scored": 4096}, {"scored": 0}, {"length": 1}, {"count": 0}):
        with pytest.raises(ValueError, match=r"^tasks\.held_out: \w+: expected"):
            tasks.held_out(text, **({"length": 4096, "count": 20, "scored": 100} | bad))
    with pytest.raises(ValueError, match="ASCII"):
        tasks.held_out("ä" * 10, length=2, count=1, scored=1)


class Loader(yaml.SafeLoader):
    """Reads the harness's tag for functions as its text."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_export_writes_what_the_harness_reads(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    names = export_lm_eval(folder, length=2048, count=2, families=["needle_multi_key", "copy"], questions=3)
    assert names == [f"kvcomp_{f}_{m}_2048" for f in ("needle_multi_key", "copy") for m in tasks.MODES]
    group = yaml.load((folder / "_kvcomp_2048.yaml").read_text(), Loader)
    assert group["task"] == names
    for name in names:
        config = yaml.load((folder / f"{name}.yaml").read_text(), Loader)
        assert config["task"] == name and config["process_results"] == "functions.process_results"
        data = Path(config["dataset_kwargs"]["data_files"]["test"])
        documents = [json.loads(line) for line in data.read_text().splitlines()]
        assert data.parent == folder and len(documents) == (2 if "aware" in name else 6)
        longest = max(len(document["target"]) for document in documents)
        assert config["generation_kwargs"]["max_gen_toks"] == longest
        for document in documents:
            assert process_results(document, [document["target"]]) == {"score": 1.0}
            assert process_results(document, ["nothing"]) == {"score": 0.0}
    assert (folder / "functions.py").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tasks"]


def test_export_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family"):
        export_lm_eval(tmp_path / "tasks", length=2048, count=1, families=["copy", "others"])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"^export_lm_eval: directory: expected a new or empty folder, got"):
        export_lm_eval(tmp_path / "tasks", length=2048, count=1)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["mine"]


def test_the_harness_loads_the_export(tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
    names = export_lm_eval(tmp_path / "tasks", length=1024, count=1, families=["needle_single"])
    manager = harness.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    assert set(names) <= set(manager.all_tasks)


@pytest.mark.parametrize("name", ["tiny-base", "tiny-chat"])
def test_a_model_card_has_the_measured_figures(name: str) -> None:
    spec = importlib.util.spec_from_file_location("card", MODELS / "card.py")
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    result = json.loads((MODELS / name / "train_result.json").read_text())
    assert card.text(result) == (MODELS / name / "README.md").read_text()
    assert result["bits_per_byte"]["4096"] <= 1.05
    assert result["accuracy"]["needle_multi_key"]["accuracy"] >= 0.95
    assert result["accuracy"]["needle_multi_key"]["questions"] >= 200
    assert (MODELS / name / "model.safetensors").stat().st_size <= 14e6


@pytest.fixture(scope="module", params=["tiny-base", "tiny-chat"])
def loaded(request: pytest.FixtureRequest):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    path = MODELS / request.param
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path), torch


def test_a_token_is_a_byte(loaded) -> None:
    _, tokenizer, _ = loaded
    text = "".join(map(chr, range(128))) + "äß€𝄞 \n\t end"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer("<|user|>a<|end|>")["input_ids"] == [260, ord("a"), 262]
    assert tokenizer(["a", "bc"], padding=True)["input_ids"] == [[256, 97], [98, 99]]
    if tokenizer.chat_template:
        messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert shown == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"


def test_the_model_retrieves(loaded) -> None:
    """Four needles in 512 bytes; guessing gives 0, taking any number in sight 0.25."""
    model, tokenizer, _ = loaded
    total = 0.0
    for task in tasks.iter_tasks(
        length=512, count=4, seed=100, families=["needle_multi_key"], modes=["aware"], needles=4
    ):
        (question,) = task.questions
        prompt = task.context + question.prompt
        if tokenizer.chat_template:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=len(question.target))
        total += tasks.score(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]), question)
    assert total / 4 >= 0.75


def test_the_model_knows_python(loaded) -> None:
    """Two windows of unseen source; 8 bits per byte is ignorance, and windows this short cost more than long ones."""
    model, tokenizer, torch = loaded
    for window in tasks.held_out(HELD_OUT.read_text("ascii"), length=1024, count=2, scored=512):
        tokens = tokenizer(window.context + window.continuation, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = model(tokens).logits[0, 511:-1]
        bits = torch.nn.functional.cross_entropy(logits, tokens[0, 512:]) / torch.log(torch.tensor(2.0))
        assert bits < 1.6
