# Builds two images: `node` has the patched bitcoind, `traincert` also has the programs of all other roles.
# `make images` builds both.
#
# PROGRAMS=cached copies bitcoind and bitcoin-cli from build/programs/ and does not build them. Those programs must come
# from a build on Debian 12.
# TORCH_INDEX is PyTorch's package index for CPU wheels. Without it, pip installs the much larger PyTorch for NVIDIA
# GPUs.
ARG PROGRAMS=built

FROM debian:bookworm-slim AS built
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends \
    build-essential ccache cmake libboost-dev libevent-dev libsqlite3-dev libzmq3-dev ninja-build patch pkgconf \
    python3-pip python3-psutil python3-requests
WORKDIR /source
COPY src src
COPY regtest regtest
COPY bitcoind-patch bitcoind-patch
RUN --mount=type=cache,target=/root/.cache/ccache --mount=type=cache,target=/root/.cache/traincert/sources \
    PYTHONPATH=src python3 -u -c "from traincert.regtest import build_node; build_node(progress=print)" \
    && cd /root/.cache/traincert/nodes/*/bin && install -D --target-directory=/programs bitcoind bitcoin-cli

FROM scratch AS cached
COPY build/programs /programs

FROM ${PROGRAMS} AS programs

FROM debian:bookworm-slim AS node
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends \
    libevent-core-2.1-7 libevent-extra-2.1-7 libevent-pthreads-2.1-7 libsqlite3-0 libzmq5 \
    && useradd --uid 1000 --create-home bitcoin \
    && install --directory --owner=bitcoin --group=bitcoin --mode=700 /home/bitcoin/.bitcoin
COPY docker/entrypoint docker/healthcheck /usr/local/bin/
COPY --from=programs /programs /usr/local/bin
USER bitcoin
WORKDIR /home/bitcoin
VOLUME /home/bitcoin/.bitcoin
EXPOSE 18443 18444
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s CMD ["healthcheck"]
ENTRYPOINT ["entrypoint"]

FROM debian:bookworm-slim AS python
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends python3-venv \
    && python3 -m venv /opt/traincert
WORKDIR /source
COPY pyproject.toml requirements.lock requirements-broker.lock docker/torch-size ./
ARG TORCH_INDEX
# First install the dependencies, with pinned versions. They change seldom, so Docker can cache this layer.
RUN --mount=type=cache,target=/root/.cache/pip /opt/traincert/bin/pip install --disable-pip-version-check \
    --no-deps --require-hashes --requirement requirements-broker.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
    extras = project["optional-dependencies"]; extras["core"] = project["dependencies"]; \
    wanted = [each for name in ("core", "explorer", "train", "privacy") for each in extras[name]]; \
    print(*(each for each in wanted if not each.startswith("traincert")), sep="\n")' \
    > requirements.txt \
    && sh torch-size /opt/traincert/bin/pip ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
    && /opt/traincert/bin/pip install --disable-pip-version-check \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint requirements.lock --requirement requirements.txt
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip /opt/traincert/bin/pip install --disable-pip-version-check --no-deps .

FROM node AS traincert
USER root
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends python3
COPY --from=python /opt/traincert /opt/traincert
ENV PATH=/opt/traincert/bin:$PATH
COPY docker/prepare docker/member /usr/local/bin/
# compose.yaml mounts volumes on these folders. A new volume gets its folder's owner, so the user bitcoin can write.
RUN install --directory --owner=bitcoin --group=bitcoin --mode=700 \
    /coordinator /broker /broker/broker /broker/broker/server /cosigner /miner /node0 /node1 /node2 /handover \
    /handovers /handovers/cosigner1 /handovers/cosigner2 /handovers/miner0 /handovers/miner1 /handovers/miner2 /handovers/miner3
USER bitcoin
HEALTHCHECK NONE
# A container's first process ignores SIGTERM unless it handles it. Python handles only SIGINT.
STOPSIGNAL SIGINT
CMD ["traincert"]
