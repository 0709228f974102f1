PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo-output
BIN = $(VENV)/bin

.PHONY: demo evidence evidence-full gpu-report test lint docs dist clean

demo: $(VENV)/demo.done
	$(BIN)/python examples/demo.py --output "$(OUTPUT)" $(if $(IMAGE),--image "$(IMAGE)") $(if $(PROMPT),--prompt "$(PROMPT)")

# a subset, in minutes; evidence-full is everything, and goes on where it was stopped
evidence: $(VENV)/evidence.done
	PYTHONPATH=examples:benchmarks $(BIN)/python -m evidence run --plan quick --output evidence-output/quick

evidence-full: $(VENV)/evidence.done
	PYTHONPATH=examples:benchmarks $(BIN)/python -m evidence run --plan full --output evidence-output/full

# what adapters cost on a GPU, in under 20 minutes; TINY=--tiny proves on a CPU that it runs
gpu-report: $(VENV)/dev.done
	PYTHONPATH=examples:benchmarks $(BIN)/python -W ignore benchmarks/gpu_report.py $(TINY)

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/%.done: pyproject.toml constraints-cpu.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints-cpu.txt -e ".[$*]"
	touch $@

docs: $(VENV)/dev.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site

# what is uploaded: a wheel, and an sdist from which the tests run
dist: $(VENV)/dev.done
	rm -rf dist
	$(BIN)/python -m build --installer pip . > /dev/null
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf site dist $(VENV) "$(OUTPUT)" evidence-output
