"""docs/evaluation.md does what it says."""

import re
from pathlib import Path


PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_page_runs_and_its_example_is_of_notebook_size(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks[0].splitlines()) <= 15
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    accuracies = {row.epsilon_255: row.accuracy for row in names["summary"].rows}
    assert accuracies[0.0] > 85 > accuracies[4.0] > accuracies[16.0] and names["summary"].alarms == []
    assert {row.name for row in names["summary"].rows} == {"none", "<lambda>"}
    perturbation = (names["found"].images_01 - names["images_01"][1400:1410]).abs().max()
    assert 15 / 255 < perturbation <= 16 / 255 + 1e-6
    assert "certified_accuracy" in capsys.readouterr().out


def test_every_alarm_is_explained():
    source = (PAGE.parents[1] / "modeling_nim/robustness/alarms.py").read_text()
    alarms = set(re.findall(r'_alarm\(\s*"(\w+)"', source))
    assert alarms and all(f"`{alarm}`" in PAGE.read_text() for alarm in alarms)
