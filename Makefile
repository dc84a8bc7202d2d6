.PHONY: check lint types test docs notebooks

check: lint types test  ## everything that CI checks

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:  ## in two processes
	pytest -n 2 --dist worksteal

docs:  ## the site, in ./site; needs the extra docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

notebooks:  ## run the tutorials and save them with their output; needs the extras docs and dev
	python docs/notebooks.py
