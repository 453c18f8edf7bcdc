"""The tables and findings of the documents are what the result files say."""

import json
import re
import shutil

import pytest

from recipes.studies import STUDIES
from reports import readme as make_readme


RESULTS = make_readme.ROOT / "results"
TEMPLATES = sorted((make_readme.ROOT / "scripts/reports/templates").iterdir())
DOCUMENTS = [make_readme.ROOT / "README.md", *sorted((make_readme.ROOT / "docs").glob("*.md"))]


def test_the_documents_are_up_to_date_with_the_results():
    assert make_readme.main(["--check"]) == 0, "run `make cards`"
    marked = [name for path in DOCUMENTS for name in make_readme.MARKED.findall(path.read_text(encoding="utf-8"))]
    templates = {path.name.partition(".")[0] for path in TEMPLATES} - {"macros", "paper_tables"}
    assert {name for _, name, _ in marked} == templates


def test_every_result_is_shown_in_a_document_a_card_or_a_table_of_the_paper():
    shown = set(re.findall(r"\b(\w+)\.(\w+)", "".join(path.read_text(encoding="utf-8") for path in TEMPLATES)))
    for card in make_readme.ROOT.glob("model_cards/*/card.yaml"):
        shown |= set(re.findall(r"results/(\w+)/(\w+)\.json", card.read_text(encoding="utf-8")))
    shown |= {(key, row.result) for key, study in STUDIES.items() for table in study().tables for row in table.rows}
    results = {
        (path.parent.name, path.stem)
        for path in RESULTS.glob("*/*.json")
        if "provenance" in json.loads(path.read_text(encoding="utf-8"))
    }
    assert {("digits", "baselines"), ("photos", "psnr"), ("cifar10", "votes")} <= results  # they were found
    assert results - shown == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_number_that_was_changed_by_hand_is_made_again(path):
    text = path.read_text(encoding="utf-8")
    for start, _, end in make_readme.MARKED.findall(text):
        changed = text.replace(start, start + "97.9 by hand\n")
        assert changed != text and end in changed
        assert make_readme.filled(changed, RESULTS) == text


def test_the_demo_table_shows_the_rows_of_the_summary(tmp_path):
    shutil.copytree(RESULTS / "digits", tmp_path / "digits")
    file = tmp_path / "digits" / "summary.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    for row in summary["rows"]:
        if (row["model"], row["sigma"], row["threat_model"]) == ("purified", 75, "white_box"):
            row["accuracy"] = 10.0 + row["epsilon_255"]
            row["ci95"] = [row["accuracy"] - 1, row["accuracy"] + 1]
    file.write_text(json.dumps(summary))
    made = make_readme.filled("<!-- results:demo -->\n<!-- end -->", tmp_path)
    [line] = [line for line in made.splitlines() if line.startswith("| purified, sigma 75")]
    assert "| 14.0 / 18.0 [17.0, 19.0] / 26.0 |" in line


def test_models_of_one_name_in_two_evaluations_are_told_apart():
    pairs = make_readme.paired(RESULTS, "cifar10_long/attack_eot", "cifar10_long/attack_eot=longer ")
    same = [row for row in pairs if row["models"] == ["undefended", "longer undefended"]]
    assert same and all(row["p_value"] == 1 and len(set(row["accuracy_majority"])) == 1 for row in same)
    assert ["hardened @ sigma 30", "longer adversarial"] in [row["models"] for row in pairs]
