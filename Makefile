# The project's commands. Everything runs in .venv, which `make setup` fills with the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# One process on the CPU: the same as under scripts/launch.py with scripts/launch/cpu.yaml, without its imports in every step.
RUN := ACCELERATE_USE_CPU=true $(BIN)/python
DIGITS := scripts/recipes/digits

.PHONY: setup demo test test-transformers test-oldest test-oldest-transformers test-newest lint bench cards space clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Pre-train, fine-tune on original and on denoised images, harden both, attack, draw: the paper on handwritten digits and what
# adversarial training adds to it. The undefended and the defended model are trained side by side, a thread each.
demo: setup
	$(RUN) scripts/run_pretrain.py $(DIGITS)/pretrain_nim_mae.yaml
	export OMP_NUM_THREADS=1; \
	( $(RUN) scripts/run_finetune.py $(DIGITS)/finetune_original.yaml && \
	  $(RUN) scripts/run_finetune.py $(DIGITS)/finetune_adversarial.yaml ) & undefended=$$!; \
	$(RUN) scripts/run_finetune.py $(DIGITS)/finetune_denoised.yaml && \
	$(RUN) scripts/run_finetune.py $(DIGITS)/finetune_hardened.yaml; defended=$$?; \
	wait $$undefended && exit $$defended
	$(RUN) scripts/run_attack.py $(DIGITS)/attack.yaml
	$(BIN)/python scripts/reports/figures.py outputs/demo

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# transformers' own common tests on our classes; pip downloads its source distribution once, into .cache/.
test-transformers: setup
	$(BIN)/python -m pytest -c tests/transformers_common/pytest.ini tests/transformers_common

# The ends of the ranges in setup.cfg, each in an environment of its own that has everything else from .venv. The oldest
# PyTorch is a download of 3 GB, which oldest-transformers does without; the newest is the one of constraints.txt.
oldest := torch==2.11.0 transformers==5.18.0
oldest-transformers := --no-deps transformers==5.18.0
newest := --no-deps transformers==5.24.0
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.venv-%/.installed: Makefile | setup
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet $($*)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > "$$(.venv-$*/bin/python $(PURELIB))/zz_after_its_own.pth"
	touch $@

test-oldest test-oldest-transformers test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile tests/models tests/hub/test_hub.py tests/hub/test_releases.py tests/runs/test_export.py
	.venv-$*/bin/python -m pytest -c tests/transformers_common/pytest.ini tests/transformers_common

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Ratios against peers, measured in one run each; the numbers land in outputs/bench/.
bench: setup
	$(BIN)/python scripts/bench/loader.py
	$(BIN)/python scripts/bench/pretrain.py
	$(BIN)/python scripts/bench/purify.py
	$(BIN)/python scripts/bench/training.py
	test -f outputs/photos/efficientnet_lite0/config.json || $(BIN)/python examples/efficientnet_lite.py outputs/photos/efficientnet_lite0
	$(BIN)/python scripts/bench/tiles.py
	$(BIN)/python scripts/bench/startup.py
	$(BIN)/python scripts/bench/attack.py

# Cards, code and results of the released models, the README's tables and those of results/cifar10, from the result files.
cards: setup
	$(BIN)/python scripts/reports/cards.py
	$(BIN)/python scripts/releases.py
	$(BIN)/python scripts/reports/paper_tables.py --dataset cifar10 --output results/cifar10/tables.md
	$(BIN)/python scripts/reports/readme.py

space: setup
	$(BIN)/python space/app.py

clean:
	rm -rf $(VENV) .venv-* outputs build *.egg-info
