# Two commands do everything: `make demo` and `make test`. Both set the machine
# up first (setup/setup.sh), which takes under a second once that is done.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# What `make demo` judges; any arguments of `ulysses-conformance run` will do.
ARGS ?= --implementation reference --implementation deepspeed-ulysses-hf

.PHONY: help setup build demo test lint hosts-check

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

# Not part of `make test`: it makes network namespaces, as root.
hosts-check: build ## Judge the reference over MPI on two hosts, and cut one off (root, iproute2)
	.venv/bin/python tests/hosts/check.py --programs "$${CARGO_TARGET_DIR:-target}/debug"
