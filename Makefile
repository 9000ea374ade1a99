# Two commands set everything up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := model pipeline jobs tests benchmarks chaos

.PHONY: help demo test test-s3 test-placement test-metrics test-browser test-gpu test-pillow audit fmt lint chaos npy-readers fault-suites fuzz reliability bench bench-gpu full-size clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

# torch goes first and alone: asked for by another package it may come in a build that does not fit.
$(VENV)/.installed: pyproject.toml
	@echo "creating $(VENV) and installing; a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tessera needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

demo: $(VENV)/.installed  ## install, then run the main job on the pictures that ship with the project
	$(BIN)/tessera demo

QUICK := not gpu and not ceph and not prometheus and not browser and not placement
test: lint  ## format, lint, types and the quick suite (no GPU, no network but loopback)
	$(BIN)/pytest -n 2 -m "$(QUICK)" tests/unit tests/hostile tests/security
	$(BIN)/pytest -n 2 --dist loadfile -m "$(QUICK)" tests/integration

test-s3: $(VENV)/.installed-dev  ## the storage suite against Ceph's S3 server (Debian: radosgw ceph-mon ceph-osd)
	$(BIN)/pytest -m ceph

test-placement: $(VENV)/.installed-dev  ## where Ray puts replicas: four nodes of eight GPUs that are none; three minutes
	$(BIN)/pytest -m placement

test-metrics: $(VENV)/.installed-dev  ## a run watched by Prometheus (Debian: prometheus)
	$(BIN)/pytest -m prometheus

test-browser: $(VENV)/.installed-dev  ## the page of `browse` in a real browser (Debian: chromium)
	$(BIN)/pytest -m browser

test-gpu: $(VENV)/.installed-dev  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu tests/gpu

fuzz: $(VENV)/.installed-dev  ## 10 000 mutated pictures and 2 000 archives; FUZZ="--cases N --archives N --seed S"
	$(BIN)/python -m tests.hostile.fuzz $(FUZZ)

test-pillow: $(VENV)/.installed-dev  ## the golden tiles under the oldest Pillow that is supported
	$(PYTHON) -m venv $(VENV)-pillow
	$(VENV)-pillow/bin/python -m pip install --quiet --disable-pip-version-check pillow==11.3.0 numpy pytest
	$(VENV)-pillow/bin/python -m pytest -c /dev/null --rootdir . -q -p no:cacheprovider --noconftest tests/unit/pipeline/test_tiling_golden.py

# Theirs are numpy 1 and pyarrow 15; of clip-retrieval only what indexes and serves, without models.
RESULTS ?= benchmarks/results
npy-readers: $(VENV)/.installed-dev  ## autofaiss and clip-retrieval read `format: npy`, in an environment of their own
	$(PYTHON) -m venv $(VENV)-npy
	$(VENV)-npy/bin/python -m pip install --quiet --disable-pip-version-check "numpy<2" "pandas<3" "pyarrow<16" embedding-reader==1.8.1 faiss-cpu fire tqdm fsspec h5py pillow requests flask flask_restful flask_cors prometheus_client
	$(VENV)-npy/bin/python -m pip install --quiet --disable-pip-version-check --no-deps autofaiss==2.18.0 clip_retrieval==2.45.0
	$(BIN)/python -m benchmarks.npy_readers $(VENV)-npy/bin/python --results $(RESULTS)

audit: $(VENV)/.installed-dev  ## known vulnerabilities of the installed packages, where their data can be reached
	$(BIN)/python .ci/audit.py

SEED ?= 1
KILLS ?= 100
chaos: $(VENV)/.installed-dev  ## strike the main job KILLS times (100), as SEED says; half an hour, Linux
	$(BIN)/python -m chaos --seed $(SEED) --kills $(KILLS)

fault-suites: $(VENV)/.installed-dev  ## run the suites of storage faults, hostile input and the lease, and count their faults
	$(BIN)/python -m chaos.suites

reliability: $(VENV)/.installed-dev  ## docs/reliability.md from the results of the fault suites
	$(BIN)/python -m chaos.reliability

fmt: $(VENV)/.installed-dev  ## format the sources
	$(BIN)/ruff check --fix --select I --quiet $(SOURCES)
	$(BIN)/ruff format --quiet $(SOURCES)

lint: $(VENV)/.installed-dev  ## ruff and strict types
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/mypy

bench: $(VENV)/.installed-dev  ## the benchmarks of the stages, the job and the network; results go to benchmarks/results/
	$(BIN)/python -m benchmarks.stages
	$(BIN)/python -m benchmarks.end_to_end
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.encoder
	$(BIN)/python -m benchmarks.tensor_parallel

bench-gpu: $(VENV)/.installed-dev  ## the benchmarks of the network alone on a CUDA device (no Ray)
	$(BIN)/python -m benchmarks.encoder --device cuda --profile
	$(BIN)/python -m benchmarks.tensor_parallel --device cuda

full-size: $(VENV)/.installed-dev  ## load the whole 6B shape at one rank and two (11 GB of disk, 24 GiB, minutes)
	$(BIN)/python -m benchmarks.full_size

clean:  ## remove what the demo and the tests left
	rm -rf tessera-demo .mypy_cache .ruff_cache .hypothesis
