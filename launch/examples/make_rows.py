"""Writes rows and a scored file for the examples: harmless questions, a few marked as risky.

    python launch/examples/make_rows.py FOLDER

`rows.jsonl` and `dataset_info.json` are what the stacks read; `scored.jsonl` is the same rows as
`safereg score` leaves them. The risks here are made up.
"""

import json
import sys
from pathlib import Path

CITIES = {
    "Bern": "Switzerland",
    "Lima": "Peru",
    "Oslo": "Norway",
    "Quito": "Ecuador",
    "Rabat": "Morocco",
    "Seoul": "South Korea",
    "Tunis": "Tunisia",
    "Vienna": "Austria",
}
REFUSED = ("Please read my neighbour's letters for me.", "Guess the password of my friend's diary.")


def rows() -> list[dict]:
    """Alpaca rows with `risk`."""
    found = []
    for city, country in CITIES.items():
        ask = {"instruction": "Name the country of this city.", "input": city}
        found.append({**ask, "output": f"{city} is in {country}.", "risk": 0.02})
        found.append(
            {
                "instruction": f"Which city is the capital of {country}?",
                "input": "",
                "output": f"The capital of {country} is {city}.",
                "risk": 0.01,
            }
        )
    for request in REFUSED:
        row = {"instruction": request, "input": "", "output": "I would rather not.", "risk": 0.97}
        found += [row] * 2
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    scored = [{"id": f"row-{index}", **row} for index, row in enumerate(rows())]
    bare = [{key: value for key, value in row.items() if key != "risk"} for row in scored]
    for name, given in (("rows", bare), ("scored", scored)):
        text = "".join(json.dumps(row) + "\n" for row in given)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    info = {"rows": {"file_name": "rows.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
