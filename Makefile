# Each target but gpu does its own set-up: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= python3
DEMO_PROMPT ?= a red sailboat on a calm sea at sunset
DEMO_SEED ?= 1
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help demo test gpu check fix clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

demo: ## Make a picture with the shipped model: out/demo.png
	@scripts/setup runtime
	@echo 'demo: lowtide generate "$(DEMO_PROMPT)" --seed $(DEMO_SEED) --out out/demo.png'
	@.venv/bin/lowtide generate "$(DEMO_PROMPT)" --seed $(DEMO_SEED) --out out/demo.png
	@echo "demo: the picture is $(CURDIR)/out/demo.png"

test: ## Run the static checks and the tests, as CI does
	@scripts/setup dev
	@scripts/check

gpu: ## On a machine with a GPU and PyTorch, nothing installed: its tests and its benchmark, in out/gpu
	@scripts/gpu

check: ## Run the static checks alone: format, lint, types, import layers
	@scripts/setup dev
	@scripts/check static

fix: ## Format the code and mend what the linter can mend
	@scripts/setup dev
	@scripts/check fix

clean: ## Remove .venv, pictures and caches
	rm -rf .venv out build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests training benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
