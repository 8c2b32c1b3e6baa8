# What a person types here. `make` or `make help` lists it.
#
# Every target installs what it needs and the machine lacks (tests/vm/setup),
# once, and says so. Tests need root: they make network namespaces.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build demo test test-full dumps fuzz mutants lint fmt clean
MAKEFLAGS += --no-print-directory

help: ## list what can be done
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

build: ## build the agent and the static plugin as they are released (target/bin)
	@tests/vm/setup build
	@cargo build --quiet --release --locked -p ferrule-agent
	@tests/plugin-static
	@mkdir -p target/bin
	@install -m 755 "$${CARGO_TARGET_DIR:-target}/release/ferrule-agent" target/bin/ferrule-agent
	@ls -l target/bin

demo: ## one node, three pods and a Service with two backends, made, called, scaled and removed
	@demo/run

test: ## what is checked before a change lands; ends with: N passed, N failed, N skipped
	@tests/all

test-full: ## everything, with more rounds, and all of it on the oldest kernel (hours)
	@tests/all --full

dumps: ## write anew what is planned and programmed in tests/scenarios and docs/semantics.md, and print what is new
	@cargo build --quiet --locked -p ferrule-tests
	@UPDATE_GOLDEN=1 VM_WRITABLE=tests/scenarios tests/vm/run -- \
		"$${CARGO_TARGET_DIR:-target}/debug/kernel-suite" scenario/
	@UPDATE_GOLDEN=1 "$${CARGO_TARGET_DIR:-target}/debug/kernel-suite" docs/semantics

fuzz: ## bad input to every parser, a few seconds each (FUZZ_SECONDS=N)
	@tests/vm/setup build fuzz
	@tests/fuzz

mutants: ## every small change of what the model decides must fail a test of it (an hour; MUTANTS="-F REGEX")
	@tests/vm/setup build mutants
	@mkdir -p target/mutants
	@PATH="$$PWD/target/tools/bin:$$PATH" PROPTEST_MAX_SHRINK_ITERS=0 PROPTEST_DISABLE_FAILURE_PERSISTENCE=1 \
		cargo mutants --package ferrule-model --output target/mutants $(MUTANTS)

lint: ## formatting, clippy, spelling, shell scripts, licences
	@tests/lint

fmt: ## put formatting right
	@tests/vm/setup lint
	@cargo fmt --all
	@target/tools/bin/taplo fmt 2>/dev/null

clean: ## remove what was built; installed tools stay
	@find target -mindepth 1 -maxdepth 1 ! -name tools -exec rm -rf {} + 2>/dev/null || true
