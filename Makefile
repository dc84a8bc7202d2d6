.PHONY: check lint types test

check: lint types test  ## everything that CI checks

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:  ## in two processes
	pytest -n 2 --dist worksteal
