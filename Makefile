# make train      installs into .venv and runs the main job
# make test       installs into .venv and runs the tests but for the slow ones
# make test-slow  runs the slow ones
# make coverage   runs the tests but for the slow ones, and prints which lines and branches they miss
# make matrix     runs them on every supported Python that is found, with the lowest and the newest torch
# make lint       checks style and types: those of the package as users install it, of tests and of benchmarks
# make bench      measures, see docs/benchmarks.md
# make bench-gpu  measures on the accelerator of this machine, and writes docs/benchmarks-gpu.md

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow coverage matrix lint bench bench-gpu clean

train: .venv/cli
	$(BIN)/etude train

test: .venv/test
	$(BIN)/pytest -n auto --dist loadgroup -m "not slow"

test-slow: .venv/test
	$(BIN)/pytest -n auto --dist loadgroup -m slow

coverage: .venv/test
	$(BIN)/pytest -n auto --dist loadgroup -m "not slow" --cov=etude --cov-branch --cov-report=term-missing:skip-covered

matrix:
	.ci/matrix

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/installed
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/installed .
	cd build && MYPYPATH=installed ../$(BIN)/mypy --config-file ../pyproject.toml -p etude
	cd build && MYPYPATH=installed:../tests:../benchmarks ../$(BIN)/mypy --config-file ../tests/mypy.ini ../tests ../benchmarks

bench: .venv/test
	$(BIN)/python benchmarks/engine_overhead.py
	$(BIN)/python benchmarks/communication.py
	$(BIN)/python benchmarks/checkpoints.py
	$(BIN)/python benchmarks/stragglers.py --picture docs/stragglers.png
	$(BIN)/python benchmarks/drop_path.py
	for part in absent methods kernels rows inference memory plans; do $(BIN)/python benchmarks/stochastic_depth.py $$part; done

bench-gpu: .venv/test
	$(BIN)/python benchmarks/gpu.py

# One stamp per extra: an install happens again when the requirements change.
.venv/%: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
