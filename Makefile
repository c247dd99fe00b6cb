# Two commands do everything: `make demo` and `make test`. Both set the machine
# up first (setup/setup.sh), which takes under a second once that is done.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# What `make demo` judges; any arguments of `ulysses-conformance run` will do.
ARGS ?= --implementation reference --implementation deepspeed-ulysses-hf

# Where `make gpu-programs` puts what a machine with a GPU needs, and what
# `make gpu-check` tells check.py there, `--quick` for instance.
GPU_PROGRAMS ?= target/gpu-check
GPU_CHECK ?=

.PHONY: help setup build demo test lint gpu-programs gpu-check hosts-check

help: ## Show this
	@echo "usage: make TARGET"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  make demo ARGS='--implementation reference'  judges only what you name"
	@echo
	@echo "The first time downloads about 2.8 GB and takes about 10 minutes on 2 cores."

setup: ## Install what is missing on this machine and link .venv and .libtorch
	@setup/setup.sh

# One profile for everything (never --release): torch-sys' C++ is compiled once
# per profile, and that is most of a first build.
define announce
@compgen -G "$${CARGO_TARGET_DIR:-target}/debug/build/torch-sys-*/out/libtch.a" >/dev/null || \
    echo "building: the first time takes about 5 minutes on 2 cores"
endef

build: setup ## Build everything
	$(announce)
	cargo build --workspace

# Exit code 1 says that something judged is wrong, which the demo is there to
# show; all others are the demo's own failure.
demo: build ## Judge the reference and DeepSpeed's Ulysses
	@cargo run --quiet -- run $(ARGS) || [[ $$? -eq 1 ]]

test: setup ## Run all tests
	$(announce)
	cargo test --workspace

lint: setup ## Check the formatting, clippy's warnings and the documentation's
	$(announce)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

gpu-programs: setup ## Put into a folder what gpu-check needs on a machine without Rust
	$(announce)
	.venv/bin/python conformance/gpu_check/programs.py $(GPU_PROGRAMS)

# The folder is enough elsewhere, without make and this checkout:
# python3 gpu-check/check.py.
gpu-check: ## Run everything that needs a GPU, and write down what was found
	@[[ -e $(GPU_PROGRAMS)/check.py ]] || { command -v cargo >/dev/null && $(MAKE) gpu-programs; } || \
	    { echo "there are no programs in $(GPU_PROGRAMS): make gpu-programs where cargo is, and bring the folder"; exit 1; }
	@python=$${ULYSSES_PYTHON:-.venv/bin/python}; [[ -x $$python ]] || python=python3; \
	    $$python $(GPU_PROGRAMS)/check.py --out "$${OUT:-docs/gpu-results}" $(GPU_CHECK)

# Not part of `make test`: it makes network namespaces, as root.
hosts-check: build ## Judge the reference over MPI on two hosts, and cut one off (root, iproute2)
	.venv/bin/python tests/hosts/check.py --programs "$${CARGO_TARGET_DIR:-target}/debug"
