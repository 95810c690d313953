#!/usr/bin/env bash
# Two hosts on one machine: the launch script runs once in each of two network namespaces that are
# joined by a veth pair, one CPU rank each.
#   bash tests/launch/two_hosts.sh OUTPUT [--key value ...]
# Needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2; exits with 77 where it lacks them.
# OUTPUT/host0 gets the run; both hosts print to OUTPUT/host0.log and OUTPUT/host1.log.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
output=$1
shift
suffix=$$
hosts=("cvt-$suffix-0" "cvt-$suffix-1")
host=
links=("cvt${suffix}a" "cvt${suffix}b")

trap 'for host in "${hosts[@]}"; do ip netns del "$host" 2>/dev/null || true; done' EXIT

[ "$(id -u)" = 0 ] && command -v ip >/dev/null || exit 77
ip netns add "${hosts[0]}" 2>/dev/null || exit 77
ip netns add "${hosts[1]}" || exit 77
ip link add "${links[0]}" type veth peer name "${links[1]}" || exit 77
for i in 0 1; do
  ip link set "${links[i]}" netns "${hosts[i]}"
  ip -n "${hosts[i]}" addr add "10.77.0.$((i + 1))/24" dev "${links[i]}"
  ip -n "${hosts[i]}" link set lo up
  ip -n "${hosts[i]}" link set "${links[i]}" up
done

mkdir -p "$output"
pids=()
for i in 0 1; do
  DEVICE_TARGET=CPU NODE_NUM=2 NODE_RANK=$i MASTER_ADDR=10.77.0.1 \
    ip netns exec "${hosts[i]}" bash "$project/scripts/run_distribute_train.sh" \
    config/digits/cvt_nano.yaml - 1 --output "$output/host$i" "$@" >"$output/host$i.log" 2>&1 &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
