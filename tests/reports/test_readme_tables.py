"""The README's tables are what the result files say."""

import json

from reports import readme as make_readme


def test_the_readme_is_up_to_date_with_the_results(monkeypatch, tmp_path):
    readme = (make_readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert make_readme.filled(readme) == readme, "run `make cards`"
    assert make_readme.main(["--check"]) == 0
    changed = readme.replace("| **purified, sigma 75** |", "| **purified, sigma 75**  |")
    assert changed != readme and make_readme.filled(changed) == readme


def test_the_demo_table_shows_the_rows_of_the_summary():
    summary = json.loads((make_readme.DIGITS / "summary.json").read_text(encoding="utf-8"))
    table = make_readme.demo_table(summary)
    [row] = [
        row
        for row in summary["rows"]
        if (row["model"], row["sigma"], row["threat_model"], row["epsilon_255"]) == ("purified", 75, "white_box", 8)
    ]
    [line] = [line for line in table.splitlines() if line.startswith("| **purified, sigma 75**")]
    low, high = row["ci95"]
    assert f"{row['accuracy']:.1f} [{low:.1f}, {high:.1f}]" in line
