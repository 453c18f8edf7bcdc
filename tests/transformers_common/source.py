"""transformers' own common tests, which its source distribution holds and its wheel does not, as an importable package.

`load()` downloads the source distribution of the installed version once, with pip, into `.cache/`.
"""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import transformers


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "transformers-tests"

# What the common tests import from tests of exporters and of text generation, which the distribution leaves out.
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = "
    "{'return_dict': False, 'output_hidden_states': True}\n",
}


def load(name: str) -> ModuleType:
    """A module of transformers' common tests, such as "test_modeling_common".

    Raises:
        RuntimeError: pip gets no source distribution.
    """
    version = transformers.__version__
    folder = CACHE / version
    package = folder / "transformers_tests"
    if not (package / "__init__.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"transformers-{version}.tar.gz"
        if not archive.exists():
            download = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", f"transformers=={version}"]
            done = subprocess.run([sys.executable, "-m", "pip", *download, "--dest", str(folder)])
            if done.returncode or not archive.exists():
                raise RuntimeError(f"pip gets no source distribution of transformers {version}; its tests are in there")
        _unpack(archive, package)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(f"transformers_tests.{name}")


def _unpack(archive: Path, package: Path) -> None:
    """The files of the distribution's `tests` folder, and the stubs; `__init__.py` last, which marks completeness."""
    package.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (package / parts[2]).write_bytes(tar.extractfile(member).read())
    for name in sorted(STUBS, key=lambda name: name == "__init__.py"):
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUBS[name])
