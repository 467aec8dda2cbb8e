#!/bin/sh
# Makes this machine ready for the Docker tests: an engine that answers, with the image debian:bookworm-slim.
#
# Where no registry can be reached the image is made with debootstrap, and gets this machine's certificates and its
# configuration of apt and pip. What is missing comes from apt-get. An engine that this starts stays.
set -eu

BASE=debian:bookworm-slim
LOG=/var/log/dockerd.log

answers() {
  docker version > /dev/null 2>&1
}

start_engine() {
  [ "$(id -u)" = 0 ] || { echo "No Docker engine answers, and only root can start one." >&2; exit 1; }
  # All of its own: whoever called us must not wait for it.
  setsid dockerd > "$LOG" 2>&1 < /dev/null &
  engine=$!
  until answers; do
    kill -0 $engine 2> /dev/null || { tail "$LOG" >&2; exit 1; }
    sleep 0.2
  done
}

bootstrap() (
  root=$(mktemp -d)
  trap 'rm -rf "$root"' EXIT
  debootstrap --variant=minbase --include=ca-certificates bookworm "$root" > "$root.log" || { tail "$root.log" >&2; exit 1; }
  rm -rf "$root.log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
  rm "$root/etc/apt/sources.list"
  cp -r /etc/apt/. "$root/etc/apt/"
  wheels=$(python3 -m pip config get global.find-links 2> /dev/null || true)
  for path in /etc/pip.conf /etc/xdg/pip "$HOME/.config/pip" $wheels; do
    [ ! -e "$path" ] || cp -r --parents "$path" "$root"
  done
  tar -C "$root" -c . | docker import --change 'CMD ["bash"]' - "$BASE" > /dev/null
)

missing=
for package in docker.io iptables docker-compose debootstrap; do
  [ "$(dpkg-query -W -f '${db:Status-Status}' $package 2> /dev/null)" = installed ] || missing="$missing $package"
done
if [ -n "$missing" ]; then
  apt-get -qq update
  # shellcheck disable=SC2086 # several words
  DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $missing > /dev/null
fi
answers || start_engine
docker image inspect "$BASE" > /dev/null 2>&1 || docker pull --quiet "$BASE" 2> /dev/null || bootstrap
