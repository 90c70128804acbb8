from pathlib import Path

import pytest

from gateway.bench.quality_tasks import TaskError, built_in, dimension, read_tasks

TASK = "tasks:\n  - name: a\n    scenario: s\n    prompt: p\n    checks: [{kind: finished}]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_built_in_tasks_cover_each_scenario_at_least_twice() -> None:
    scenarios = [task.scenario for task in built_in()]
    assert {name: scenarios.count(name) for name in scenarios} == {
        "code-completion": 2,
        "code-review": 2,
        "architecture-design": 2,
        "debugging": 2,
        "korean": 2,
    }
    assert [task.name for task in built_in() if task.language == "ko"] == ["korean-summary", "korean-extraction"]


def test_every_task_measures_accuracy_and_clarity() -> None:
    for task in built_in():
        assert {"accuracy", "clarity"} <= {dimension(check) for check in task.every_check}


def test_a_tasks_own_check_replaces_the_one_of_every_task(tmp_path: Path) -> None:
    text = TASK.replace("{kind: finished}", "{kind: finished, points: 7}")
    task = read_tasks(write(tmp_path, text))[0]
    kinds = [(type(check).__name__, check.points) for check in task.every_check]
    assert kinds == [("Finished", 7.0), ("NotRepetitive", 1.0), ("Language", 1.0)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tasks: []", "length >= 1"),
        ("- a", "Expected `object`"),
        ("tasks: [", "expected"),
        (TASK.replace("finished", "telepathy"), r"telepathy.*checks\[0\]"),
        (TASK.replace("{kind: finished}", "{kind: finished, weight: 2}"), "weight"),
        (TASK.replace("{kind: finished}", "{kind: absent, patterns: ['(']}"), "not a regular expression"),
        (TASK.replace("{kind: finished}", "{kind: mentions, required: [['[']]}"), "not a regular expression"),
        (TASK.replace("{kind: finished}", "{kind: finished, points: 0}"), "points"),
        (TASK.replace("{kind: finished}", "{kind: mentions}"), "needs 'required'"),
        (TASK.replace("{kind: finished}", "{kind: python}"), "needs 'tests'"),
        (TASK.replace("{kind: finished}", "{kind: python, tests: ['f(1) ==']}"), "not a Python expression"),
        (TASK.replace("{kind: finished}", "{kind: json, schema: {type: 5}}"), "not a JSON Schema"),
        (TASK.replace("prompt: p", "promt: p"), "promt"),
        (TASK + TASK.removeprefix("tasks:\n"), "several tasks have the name 'a'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_place(text: str, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TaskError, match=reason) as caught:
        read_tasks(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="No such file"):
        read_tasks(tmp_path / "none.yaml")
