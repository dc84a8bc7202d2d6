.PHONY: check lint types test thorough package oldest docs notebooks

check: lint types test  ## everything about the code that CI checks

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:  ## in two processes
	pytest -n 2 --dist worksteal

thorough:  ## further cases of what `test` has one of
	pytest -n 2 --dist worksteal -m thorough

package:  ## dist/: the sdist, and the wheel made from it, looked through
	rm -rf dist
	python -m hatchling build -t sdist
	pip wheel -q --no-deps --no-build-isolation -w dist dist/*.tar.gz
	check-wheel-contents dist
	python -m zipfile -l dist/*.whl | grep dist-info/licenses/LICENSE
	python -m tarfile -l dist/*.tar.gz | grep /tests/test_package.py

# The oldest versions of everything, as constraints-oldest.txt has them. On Linux with x86-64 that torch is a build for
# CUDA, gigabytes of it; `make oldest TORCH=2.13.0` takes another one instead. PYTHON is the interpreter to test with.
PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^torch==//p' constraints-oldest.txt)
OLDEST = build/oldest/bin

oldest: package  ## the wheel in a fresh environment with the oldest versions, and the tests that show the most there
	$(PYTHON) -m venv --clear build/oldest
	sed 's/^torch==.*/torch==$(TORCH)/' constraints-oldest.txt > build/oldest.txt
	$(OLDEST)/pip install -q -c build/oldest.txt dist/*.whl
	cd build && oldest/bin/memformer --version && oldest/bin/python -W error -c "import memformer"
	$(OLDEST)/pip install -q -c build/oldest.txt "$$(echo dist/*.whl)[bpe,tensorboard,onnx,plot,digits,hf,gguf]" \
		$$(grep -E '^(pytest|pytest-xdist|hypothesis)==' constraints.txt)
	$(OLDEST)/pip check
	$(OLDEST)/pytest -n 2 --dist worksteal -m "not slow" tests/test_package.py tests/test_saved_before.py tests/test_replay.py \
		tests/test_model.py tests/test_training.py tests/test_export.py tests/test_tokenizers.py tests/test_inspection.py tests/test_hf.py \
		tests/test_hf_trainer.py tests/test_cli_base.py::test_a_gguf_of_an_unknown_architecture_is_refused \
		tests/test_cli_base.py::test_a_gguf_is_the_base_that_it_was_made_of

docs:  ## the site, in ./site; needs the extra docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

notebooks:  ## run the tutorials and save them with their output; needs the extras notebooks and dev
	python docs/notebooks.py
