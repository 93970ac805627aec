"""Claimed: a run of benchmarks/stacks_yaml.sh puts its row in the place of the one of the same
stack, ranks, accumulation and precision, and leaves the others. Exact.
"""

from stacks_yaml_worker import COLUMNS, write_row


def row(stack, ranks, error):
    return [stack, "0.1", ranks, "2", "fp32", error, "", "", "whole", ""]


def test_a_row_takes_the_place_of_the_one_of_its_key(tmp_path):
    path = tmp_path / "stacks.csv"
    for values in (row("a", "1", "old"), row("a", "2", "kept"), row("a", "1", "new")):
        write_row(path, values)
    write_row(path, row("b", "1", "more"))
    assert path.read_text() == (
        ",".join(COLUMNS) + "\n"
        "a,0.1,1,2,fp32,new,,,whole,\n"
        "a,0.1,2,2,fp32,kept,,,whole,\n"
        "b,0.1,1,2,fp32,more,,,whole,\n"
    )
