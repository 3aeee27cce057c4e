# The two commands of the README are `make demo` and `make check`. meson does the building; see CONTRIBUTING.md.
BUILD ?= build
PREFIX ?= /usr/local
DESTDIR ?=
JOBS ?= $(shell nproc)
MESON_ARGS ?=

export BUILD PREFIX JOBS

.PHONY: all setup demo check unit integration bench sanitize format format-check fuzz install uninstall deb clean help

all:
	@scripts/setup build
	@scripts/configure $(BUILD) --prefix=$(PREFIX) $(MESON_ARGS)
	@ninja -C $(BUILD) -j $(JOBS)

help:
	@echo 'make              build into $(BUILD)/ (as any user; says what is missing)'
	@echo 'make demo         install what is missing, build, checkpoint and restore a program (root)'
	@echo 'make check        install what is missing, build, run every test (root)'
	@echo 'make unit         the unit tests alone            make integration   the integration tests alone'
	@echo 'make sanitize     tests under ASan+UBSan (build-asan/) and TSan (build-tsan/)'
	@echo 'make fuzz         every fuzz target for FUZZ_SECONDS seconds (clang; build-fuzz/)'
	@echo 'make bench        measure, on a GPU if there is one, into bench/results/ (root; BENCH_ARGS="--only ...")'
	@echo 'make format       lay the sources out with clang-format 14      make format-check'
	@echo 'make install      DESTDIR= PREFIX=$(PREFIX)'
	@echo 'make deb          a Debian package, in build-deb/'

setup:
	@scripts/setup check

demo:
	@scripts/setup demo
	@$(MAKE) --no-print-directory all
	@scripts/demo $(BUILD)

check: setup
	@$(MAKE) --no-print-directory all
	@scripts/configure build-asan -Db_sanitize=address,undefined -Db_lundef=false
	@scripts/run-tests $(BUILD) build-asan:unit

unit: all
	@scripts/run-tests $(BUILD):unit

integration: all
	@scripts/run-tests $(BUILD):integration

sanitize:
	@scripts/setup check
	@scripts/configure build-asan -Db_sanitize=address,undefined -Db_lundef=false
	@scripts/configure build-tsan -Db_sanitize=thread -Db_lundef=false
	@scripts/run-tests build-asan:unit build-asan:asan build-tsan:tsan

bench: all
	@bench/run --build $(BUILD) $(BENCH_ARGS)

fuzz:
	@scripts/fuzz

format:
	@scripts/format

format-check:
	@scripts/format --check

install: all
	@DESTDIR=$(DESTDIR) meson install -C $(BUILD) --no-rebuild --quiet
	@echo "installed under $(DESTDIR)$(PREFIX)"

uninstall:
	@ninja -C $(BUILD) uninstall

deb:
	@packaging/deb/build

# Keeps the private CRIU and the set-up's stamp: they are slow to get and do not depend on the sources.
clean:
	@[ ! -e $(BUILD)/build.ninja ] || ninja -C $(BUILD) -t clean
	@rm -rf build-asan build-tsan build-fuzz build-deb
