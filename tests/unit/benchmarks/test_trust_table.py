"""Claimed: the table of docs/trust.md is what the committed results say."""

import trust_table


def test_the_table_is_that_of_the_results():
    page = trust_table.PAGE.read_text(encoding="utf-8")
    assert "| hostile and damaged files" in page
    assert trust_table.page_of(page) == page, "run: python benchmarks/trust_table.py"


def test_a_loss_shows(monkeypatch, tmp_path):
    for path in trust_table.RESULTS.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    kept = (tmp_path / "fuzz.csv").read_text().splitlines()
    first = kept[1].split(",")
    (tmp_path / "fuzz.csv").write_text(
        "\n".join([kept[0], ",".join([*first[:4], "3", *first[5:]]), *kept[2:], ""])
    )
    monkeypatch.setattr(trust_table, "RESULTS", tmp_path)
    assert any(" files, 32 targets | 1,280 | 1,277 | 3 |" in row for row in trust_table.rows())
