"""Every script explains itself: `--help` exits 0 and shows the line that launches it."""

import importlib.util
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "scripts").glob("**/*.py")), ROOT / "space" / "app.py"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_shows_what_the_script_is_for_and_how_it_is_launched(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(path.parent))  # as python does for a script
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    specification = importlib.util.spec_from_file_location(f"help_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)  # dataclasses look their module up
    specification.loader.exec_module(module)
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    assert f"{path.relative_to(ROOT)}" in shown.split("options:")[0]
    assert module.__doc__.strip().splitlines()[0] in shown
