#!/usr/bin/env bash
# Builds the images, runs preset glyphs at reduced size through a server and three clients, each in containers of its own, kills some of
# them on the way, and shows that the run goes on to the right model, and that a client's app reaches its SuperNode and nothing else.
#
#   docker/containers.sh [FOLDER]     FOLDER: new or empty, for keys, states and results (runs/containers)
#
#   ENGINE     docker or podman                                      (docker)
#   COMPOSE    what reads compose files with it                      (docker compose, podman-compose)
#   BUILD=no   take the images as they are
#   KILL       what kills a process of this machine, where that takes more than being who one is   (kill -KILL)
#   and the variables of compose.yaml and common.yaml. Without a package index: pip download -d docker/wheels -c constraints.txt
#   "setuptools>=77" . and then PIP_NO_INDEX=1
set -euo pipefail
cd "$(dirname "$0")/.."

ENGINE=${ENGINE:-docker}
[ "$ENGINE" = podman ] && default="podman-compose" || default="$ENGINE compose"
read -ra compose <<< "${COMPOSE:-$default} -p metamoe-trial -f docker/compose.yaml"
# Images of podman keep their health checks in Docker's format alone.
export BUILDAH_FORMAT=docker

folder=$(realpath -m "${1:-runs/containers}")
mkdir -p "$folder"
[ -z "$(ls -A "$folder")" ] || { echo "$folder is not empty; give another folder" >&2; exit 2; }
export FEDERATION=$folder/federation METAMOE_USER=${METAMOE_USER:-$(id -u):$(id -g)}
# Nothing runs as root: what root starts is for the user that the images name.
case $METAMOE_USER in 0:*) METAMOE_USER=1000:1000; chown "$METAMOE_USER" "$folder" ;; esac

if [ "${BUILD:-yes}" != no ]; then
    for side in server client; do
        "$ENGINE" build --file docker/Dockerfile --target "$side" --tag "metamoe-fl-$side:0.1.0" \
            --build-arg BASE="${METAMOE_BASE:-python:3.11-slim}" --build-arg PIP_NO_INDEX="${PIP_NO_INDEX:-}" \
            --build-arg PIP_INDEX_URL="${PIP_INDEX_URL:-}" --build-arg PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL:-}" .
    done
fi

begin=$SECONDS
inside() { local service=$1; shift; "${compose[@]}" exec -T "$service" "$@"; }
"$ENGINE" run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL --user "$METAMOE_USER" --volume "$folder:/out" \
    metamoe-fl-server:0.1.0 metamoe deploy keys /out/federation --clients 3
# The second run has another seed, which touches private data: each client's owner lets the server choose it.
for policy in "$folder"/federation/clients/*/policy.toml; do echo 'seed = "any"' >> "$policy"; done
trap '"${compose[@]}" down' EXIT
"${compose[@]}" up -d --no-build
for _ in {1..60}; do
    inside superlink metamoe deploy register /federation && break
    sleep 2
done
settings=(--preset glyphs --set data.private-samples=200 --set data.public-samples=4000 --set proxies.count=50 --set proxies.pool=1000
    --set expert-training.epochs=20 --set router-training.epochs=1)
run() { inside superlink metamoe deploy run /federation --out "/federation/runs/$1" "${settings[@]}" "${@:2}"; }
training() { until grep -q '"expert"' "$folder/federation/runs/$1/events.jsonl" 2> /dev/null; do kill -0 $running; sleep 0.2; done; }
# As a crash would, of which the engine is not told: it starts the container again.
container() { "$ENGINE" ps -q --filter label=com.docker.compose.project=metamoe-trial --filter "label=com.docker.compose.service=$1"; }
crash() { ${KILL:-kill -KILL} "$("$ENGINE" inspect --format '{{.State.Pid}}' "$(container "$1")")"; }

# A client's SuperNode crashes: the server waits for it, and the run comes to its end.
run first & running=$!
training first
crash supernode-0
wait $running
echo "keys, start, and a run with a crash: $((SECONDS - begin)) s"

# The server crashes, and another client's app: the run is resumed.
run second --set seed=1 & running=$!
training second
crash clientapp-1
crash superlink
wait $running || true
for _ in {1..60}; do
    inside superlink metamoe deploy resume /federation /federation/runs/second && break
    sleep 5
done

# Models of the same settings that nothing disturbed.
for number in 0 1; do
    names=(first second)
    "$ENGINE" run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL --user "$METAMOE_USER" metamoe-fl-server:0.1.0 \
        sh -c 'metamoe --quiet simulate --backend local --out /tmp/run "$@" > /dev/null && cat /tmp/run/server/summary.json' - \
        "${settings[@]}" --set "seed=$number" > "$folder/undisturbed-$number.json"
    python3 - "$folder/undisturbed-$number.json" "$folder/federation/runs/${names[number]}/server/summary.json" << 'END'
import json, sys
undisturbed, crashed = (json.load(open(file))["model"] for file in sys.argv[1:])
sys.exit(None if undisturbed == crashed else f"after a crash another model: {crashed} in place of {undisturbed}")
END
done

# Every address of every other container, by name and by number, the gateways, and the world.
numbers='import psutil; print(*(a.address for n in psutil.net_if_addrs().values() for a in n if a.family == 2 and a.address != "127.0.0.1"))'
targets=(supernode-0:9094 gateway-0:9095 superlink:8000 supernode-1:9094 clientapp-1:22 192.0.2.1:443 1.1.1.1:53 example.org:443)
for service in superlink serverapp supernode-1; do
    for address in $(inside "$service" python3 -c "$numbers"); do
        targets+=("$address:8000" "$address:9094" "${address%.*}.1:8000")
    done
done
for address in $(inside clientapp-0 python3 -c "$numbers"); do
    targets+=("${address%.*}.1:8000" "${address%.*}.1:22")
done
reached=$(inside clientapp-0 python3 - "${targets[@]}" < docker/reach.py | tr -d '\r')
echo "of ${#targets[@]} addresses the app of client 0 reaches: $reached"
[ "$reached" = supernode-0:9094 ] || { echo "it must reach its SuperNode, and nothing else" >&2; exit 1; }
reached=$(inside supernode-0 python3 - gateway-0:9095 superlink:8000 supernode-1:9094 gateway-1:9095 < docker/reach.py | tr -d '\r')
[ "$reached" = gateway-0:9095 ] || { echo "a SuperNode must reach its gateway and nothing else; it reaches: $reached" >&2; exit 1; }
reached=$(inside gateway-0 python3 - superlink:8000 gateway-1:9095 supernode-1:9094 < docker/reach.py | tr -d '\r')
[ "$reached" = superlink:8000 ] || { echo "a gateway must reach the server and no other client; it reaches: $reached" >&2; exit 1; }
"$ENGINE" run --rm --network none --read-only --tmpfs /tmp --cap-drop ALL --user "$METAMOE_USER" --volume "$folder/federation:/federation:ro" \
    metamoe-fl-server:0.1.0 metamoe audit reconcile /federation
echo "fine: $folder/federation/runs/first"
