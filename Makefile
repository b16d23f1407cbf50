# Nothing but Python >= 3.11, pip and make is needed: each target makes .venv and installs what it needs.
PYTHON ?= python3
BIN = .venv/bin
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow test-gpu test-lowest dist docs docs-commands fuzz faults lint bench gpu clean

demo: .venv/installed
	$(BIN)/certipatch demo --out demo-out

# Two processes of one thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test: .venv/installed-dev
	$(PYTEST)

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

test-gpu: .venv/installed-dev
	$(BIN)/pytest -m gpu

# The lower bounds of pyproject.toml, in an environment of their own: the fast suite without what needs the extras.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet -c constraints-lowest.txt -e . hypothesis pytest pytest-xdist ruff
	OMP_NUM_THREADS=1 .venv-lowest/bin/pytest -n 2 --dist worksteal

# What a stranger gets: wheel and sdist, checked, installed into an empty environment, and the demo, timed.
dist:
	$(PYTHON) scripts/dist.py

# The documentation site; any warning is an error.
docs: .venv/installed-dev
	$(BIN)/python scripts/docs_site.py site
	@echo "open site/index.html"

# The commands of README.md and docs/ that want real weights and ../shared: an hour or two on two cores, each once, resumable. The tests run the rest.
docs-commands: .venv/installed-dev
	$(BIN)/python scripts/docs_commands.py

# Damaged inputs to everything that reads a file, a million of them to the readers of records, manifests and recipes.
fuzz: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore scripts/fuzz_readers.py --inputs 1200000

# Kills, full disks, damaged files, vanishing images, two writers: an hour on two cores; as root for the full disks.
faults: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python scripts/fault_bench.py --out faults.json

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/measure.py

# make bench HARDWARE=xeon-2core; an hour, on a machine that does nothing else.
bench: .venv/installed-dev
	benchmarks/run.sh $(HARDWARE)

.venv/installed: pyproject.toml constraints.txt
	@echo "installing PyTorch and the rest into .venv: some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# A GPU that is at hand for minutes: make gpu OUT=DIR [SECONDS=480] [DATA=FOLDER]. The same command goes on.
SECONDS ?= 480
gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py --out $(OUT) --seconds $(SECONDS) $(if $(DATA),--data $(DATA))

clean:
	rm -rf .venv .venv-lowest dist demo-out site .pytest_cache .mypy_cache .ruff_cache
