# Needs python3 (3.10 to 3.13), make and, for the native kernels, a C++ compiler. Everything it
# installs goes into .venv.
#
#   make demo                    the main job: invert, edit, align
#   make test                    the test suite; ARGS="-k lattice" goes to pytest
#   PYTHON=python3.12 make test  another interpreter

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# Names the state of everything that an installed environment depends on, so that a stamp file with
# this name means "nothing to do" whatever the clock says.
KEY := $(shell { $(PYTHON) --version; pwd; echo "$(INPO_FAST_NATIVE)" "$${TORCH_CUDA_ARCH_LIST}"; \
	command -v "$${CXX:-c++}"; command -v nvcc; \
	cat .constraints.txt pyproject.toml setup.py inpo_fast/_version.py $$(find csrc -type f | LC_ALL=C sort); } 2>&1 \
	| cksum | cut -d' ' -f1)
DEMO := $(VENV)/.demo-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
CXX_SOURCES := $(wildcard csrc/*.* csrc/cuda/*.*)

HAS_HEADERS := import os, sys, sysconfig; \
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))

.PHONY: demo test lint format typecheck bench soak sanitize clean

demo: $(DEMO)
	$(PY) -m inpo_fast demo $(ARGS)

# One thread per worker: two workers with a thread pool each would fight over the cores.
test: $(DEV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal $(ARGS)

lint: typecheck
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

typecheck: $(DEV)
	$(PY) -m mypy

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

bench: $(DEV)
	$(PY) -m benchmarks.run ops --device cpu $(ARGS)

soak: $(DEV)
	$(PY) -m tests.ops.soak --programs 100000 $(ARGS)

# Needs a GPU and CUDA's compute-sanitizer. The first run fills the caches of the compilers.
sanitize: $(DEV)
	$(PY) -m tests.gpu.sanitize
	for tool in memcheck racecheck initcheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(PY) -m tests.gpu.sanitize || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info inpo_fast/_C*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(DEMO): EXTRAS := demo
$(DEV): EXTRAS := test,lint
$(DEMO) $(DEV):
	@$(PYTHON) -c '' 2>/dev/null || { echo "make: $(PYTHON) not found: install Python 3.10 to 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "make: $$($(PYTHON) --version 2>&1) is not supported: set PYTHON to a Python 3.10 to 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: this Python has no venv module: install its venv package (Debian: apt install python3-venv)" >&2; exit 1; }
	@version=$$($(PYTHON) -c 'import sys; print("(python %d.%d)" % sys.version_info[:2])'); \
	if ! $(PY) -m pip --version 2>/dev/null | grep -qF "$$version"; then \
		df -Pk . | awk 'NR == 2 { exit $$4 < 3000000 }' \
			|| { echo "make: less than 3 GB of disk free: the environment does not fit" >&2; exit 1; }; \
		echo "==> creating $(VENV) $$version"; \
		$(PYTHON) -m venv --clear $(VENV) \
			|| { echo "make: could not create $(VENV), see above" >&2; exit 1; }; \
	fi
# An extension of an earlier build would be loaded even where this build makes none.
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-* inpo_fast/_C*.so
	@echo "==> installing pinned torch (minutes when it must be downloaded)"
# The build needs torch, and must use this one: hence no build isolation in the second step.
	@$(PIP) install -c .constraints.txt torch setuptools pybind11 ninja \
		|| { echo "make: pip could not install torch, see above" >&2; exit 1; }
	@if [ "$$INPO_FAST_NATIVE" = 0 ]; then echo "==> INPO_FAST_NATIVE=0: no native extension"; \
	elif ! command -v "$${CXX:-c++}" >/dev/null; then \
		echo "==> no C++ compiler: no native extension, the reference backend serves"; \
	elif ! $(PY) -c '$(HAS_HEADERS)'; then \
		echo "==> no Python.h (Debian: apt install python3-dev): no native extension, the reference backend serves"; \
	fi
	@echo "==> installing pinned dependencies and building inpo_fast[$(EXTRAS)]"
	@$(PIP) install -c .constraints.txt --no-build-isolation -e '.[$(EXTRAS)]' \
		|| { echo "make: pip could not install inpo_fast, see above" >&2; exit 1; }
	@$(PY) -m inpo_fast env
# The test environment contains the one for the demo.
	@touch $@ $(DEMO)
