# A thin front for CMake's presets; everything that builds is in CMakeLists.txt.
#   make         the release build in build/, the command is build/bin/epx
#   make demo    set up this machine, build, run the main job
#   make test    set up this machine, build, run all tests that it can run
SHELL := /bin/bash
JOBS := $(shell nproc)
FORMATTED := $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: all setup setup-test demo test asan tsan dev gpu-test bench-peers test-rxe mutations models format check-format \
	includes install clean

all: setup
	@said=$$(cmake --preset release 2>&1) || { echo "$$said"; exit 1; }; echo "$$said" | grep '^-- EPX_' || true
	cmake --build --preset release -j $(JOBS)

setup:
	@tools/setup.sh build

setup-test: setup
	@tools/setup.sh test
	@if [ -x tools/setup_python.sh ]; then tools/setup_python.sh; fi

demo: all
	build/bin/epx demo
	@if [ -e build/lib/libepx_ofi.so ]; then echo build/bin/epx demo --domains 2; build/bin/epx demo --domains 2; fi

test: setup-test all
	ctest --preset release -j $(JOBS) $(CTEST_FLAGS)

# What a sanitizer build runs: all but what measures, or says nothing new there.
SANITIZED := -LE 'gpu|model|headers|includes|install|mutation|rxe|python'
asan: setup
	cmake --preset asan && cmake --build --preset asan -j $(JOBS) && ctest --preset asan -j $(JOBS) $(SANITIZED) $(CTEST_FLAGS)

# TSan sees ranks that are threads of one process.
tsan: setup
	cmake --preset tsan && cmake --build --preset tsan -j $(JOBS) && ctest --preset tsan -j $(JOBS) $(SANITIZED) $(CTEST_FLAGS)

dev: setup
	cmake --preset dev && cmake --build --preset dev -j $(JOBS)

mutations: setup
	cmake --preset mutations && cmake --build --preset mutations -j $(JOBS) && \
		ctest --test-dir build-mutations -L mutation --output-on-failure $(CTEST_FLAGS)

models: setup-test all
	ctest --preset release -L model

gpu-test: setup
	tests/gpu/all.sh -m 30

bench-peers: all
	@tools/setup.sh bench
	bench/peers/run.sh
	@if [ -e build/lib/libepx_ofi.so ]; then bench/peers/run.sh tcp; fi

test-rxe: setup-test all
	ctest --preset release -L rxe

format:
	clang-format-14 -i $(FORMATTED)

check-format:
	@clang-format-14 --dry-run -Werror $(FORMATTED) && echo "$(words $(FORMATTED)) files are formatted"

includes:
	@tools/check_includes.sh

PREFIX ?= /usr/local
install: all
	cmake --install build --prefix $(DESTDIR)$(PREFIX)

clean:
	rm -rf build build-dev build-asan build-tsan build-cuda build-mutations
