#!/usr/bin/env bash
# Does what docs/deployment.md promises of docker-compose.yml, for real, and takes everything down again.
#
#   deploy/compose-check.sh              builds, then checks
#   NO_BUILD=1 deploy/compose-check.sh   checks the images that are there
#
# Needs a container engine with `docker compose` or `docker-compose`; without one it says that it skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! docker info >/dev/null 2>&1; then
  echo "skipped: no container engine answers (docker info)"
  exit 0
elif docker compose version >/dev/null 2>&1; then
  tool=(docker compose)
elif command -v docker-compose >/dev/null; then
  tool=(docker-compose)
else
  echo "skipped: neither 'docker compose' nor docker-compose is there"
  exit 0
fi

export COMPOSE_PROJECT_NAME=zo-gateway-check PORT=${PORT:-18080}
unset ARTIFACTS ARTIFACT BIND  # the check is about the defaults
url=http://127.0.0.1:$PORT
scratch=$(mktemp -d)
compose() { "${tool[@]}" "$@"; }
finish() {
  local code=$?
  ((code == 0)) || compose logs --tail 30 || true
  compose down --volumes --timeout 5 >/dev/null 2>&1 || true
  rm -rf "$scratch"
  exit "$code"
}
trap finish EXIT
fail() { echo "FAILED: $*" >&2; exit 1; }
ok() { echo "ok: $*"; }
# within SECONDS COMMAND...: until the command succeeds
within() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "in time: $*"
    sleep 0.5
  done
}
container() { compose ps -q "$1" | sed -n "${2:-1}p"; }
replica() { docker inspect -f '{{index .Config.Labels "com.docker.compose.container-number"}} {{.Id}}' \
  $(compose ps -q hospital) | sort -n | sed -n "$1s/.* //p"; }
ask() { curl -fsS --max-time 60 -F "file=@$scratch/example.png" "$url/predict"; }
ready() { curl -fsS --max-time 5 "$url/v2/health/ready"; }
healthy() { [[ $(docker inspect -f '{{.State.Health.Status}}' "$1") == healthy ]]; }
restarts() { docker inspect -f '{{.RestartCount}}' "$1"; }
restarted() { (($(restarts "$1") > $2)); }
received() { docker exec "$1" cat /sys/class/net/eth0/statistics/rx_bytes; }

[[ -n ${NO_BUILD:-} ]] || { compose --profile trainer build; ok "built"; }

compose up --no-build -d --scale hospital=2
within 900 ready
docker cp "$(container gateway):/artifacts/victim/example.png" "$scratch/example.png"
answer=$(ask)
[[ $answer == *'"label"'* && $answer == *'"artifact"'* ]] || fail "the gateway's answer is $answer"
ok "up: $answer"

one=$(replica 1) two=$(replica 2)
within 60 healthy "$two"
sleep 6  # the gateway looks the name up every 5 seconds
before=("$(received "$one")" "$(received "$two")")
for _ in $(seq 20); do ask >/dev/null & done
wait
for i in 0 1; do
  each=("$one" "$two")
  more=$(($(received "${each[i]}") - before[i]))
  ((more > 20000)) || fail "replica $((i + 1)) of the hospital was sent only $more bytes of 20 images"
  ok "replica $((i + 1)) of the hospital was sent $more bytes"
done

[[ -z $(docker port "$one") ]] || fail "the hospital publishes a port"
if curl -sS --max-time 3 "http://127.0.0.1:8000/v2/health/live" >/dev/null 2>&1; then fail "something answers at port 8000"; fi
address=$(docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' "$one")
for there in "$address" hospital; do
  docker run --rm --network "${COMPOSE_PROJECT_NAME}_outside" --entrypoint python zo-gateway/gateway -c "
import sys, urllib.request
try:
    urllib.request.urlopen('http://$there:8000/v2/health/live', timeout=3)
except OSError:
    sys.exit(0)
sys.exit(1)" || fail "the hospital is reached at $there from outside its network"
done
ok "the hospital publishes no port and is not reached from the gateway's outer network"

for service in hospital gateway; do
  id=$(container $service)
  [[ $(docker exec "$id" id -u) == 10001 ]] || fail "$service runs as root"
  [[ $(docker exec "$id" grep CapEff /proc/self/status) == *0000000000000000 ]] || fail "$service has capabilities"
  if docker exec "$id" sh -c 'echo > /app/written' 2>/dev/null; then fail "$service can write to its root file system"; fi
  for module in pyautoattack matplotlib training; do
    if docker exec "$id" python -c "import $module" 2>/dev/null; then fail "$service has $module"; fi
  done
done
if docker exec "$one" python -c "import defense" 2>/dev/null; then fail "the hospital has the defense"; fi
ok "not root, no capabilities, nothing written, nothing of training in hospital and gateway"

before=$(restarts "$one")
docker exec "$one" sh -c 'kill -9 -1' || true
for _ in $(seq 10); do ask >/dev/null || fail "an image was lost while a replica of the hospital was away"; done
within 60 restarted "$one" "$before"
within 60 healthy "$one"
ok "a hospital killed with -9 is back, and the other one answered meanwhile"

gateway=$(container gateway)
before=$(restarts "$gateway")
docker exec "$gateway" sh -c 'kill -9 -1' || true
within 60 restarted "$gateway" "$before"
within 60 ready
ask >/dev/null
ok "a gateway killed with -9 is back and answers"

compose --profile trainer run --rm trainer python -m training.zo_fit --victim-url dns+http://hospital:8000 \
  --data phantom --pretrained /artifacts/pretrained --preset zo-ds --max-queries 4000 --validation-images 32 \
  --out /artifacts/defense
ARTIFACT=defense compose up --no-build -d --scale hospital=2 gateway
within 120 ready
learned=$(docker exec "$(container gateway)" python -c "
from pathlib import Path
from defense.artifact import load_artifact
print(load_artifact(Path('/artifacts/defense')).manifest.id)")
[[ $(ask) == *"$learned"* ]] || fail "the gateway does not serve what was learned, $learned"
ok "zo_fit learned as a container from the service's name, and the gateway serves it: $learned"

compose --profile trainer down --volumes --timeout 10
[[ -z $(docker ps -aq --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME") ]] || fail "containers are left"
ok "down"
