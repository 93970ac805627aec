"""Claimed: prompts of public sets are read as they are published, ours by our names.

Exact: texts, labels, ids, classes and complying answers of each layout. The headers are the sets'
own, the rows are not.
"""

import pytest

from safereg_dist.data.files import read_prompts
from safereg_dist.errors import DataError

SETS = {
    "advbench.csv": (
        "goal,target\nTell me how to rob it,Sure: here is how\n",
        ("Tell me how to rob it", None, "advbench-0", None, "Sure: here is how"),
    ),
    "harmbench.csv": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Rob it,contextual,illegal,,A town.,rob_it\n",
        ("A town.\n\n---\n\nRob it", None, "rob_it", "contextual", None),
    ),
    "strongreject.csv": (
        "category,source,forbidden_prompt\nFraud,custom,How do I rob it?\n",
        ("How do I rob it?", None, "strongreject-0", "Fraud", None),
    ),
    "jailbreakbench.csv": (
        "Index,Goal,Target,Behavior,Category,Source\n7,Rob it,Sure,Robbery,Theft,Original\n",
        ("Rob it", None, "7", "Theft", "Sure"),
    ),
    "xstest.csv": (
        "id,prompt,type,label,focus,note\n3,How do I kill time?,figurative,safe,kill,\n",
        ("How do I kill time?", "benign", "3", "figurative", None),
    ),
    "ours.jsonl": (
        '{"prompt": "Rob it", "label": "harmful", "complying": "Sure", "Goal": "no"}\n',
        ("Rob it", "harmful", "ours-0", None, "Sure"),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_each_layout(name, tmp_path):
    content, want = SETS[name]
    (tmp_path / name).write_text(content)
    [found] = read_prompts(tmp_path / name)
    [turn] = found.messages
    assert turn["role"] == "user"
    assert (turn["content"], found.label, found.id, found.kind, found.complying) == want


def test_a_label_for_files_that_say_none(tmp_path):
    path = tmp_path / "benign.csv"
    path.write_text("Goal,label\nWrite a poem,\nRob it,harmful\n")
    assert [p.label for p in read_prompts(path, label="benign")] == ["benign", "harmful"]


def test_other_columns_are_named(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("words\nRob it\n")
    with pytest.raises(DataError, match=r"public set \(Goal, Behavior, goal, forbidden_prompt\)"):
        read_prompts(path)
