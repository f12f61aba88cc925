# shellcheck shell=bash
# Sourced by .ci/two_nodes and .ci/two_hosts, as root: two hosts, which are network namespaces joined by a cable, and an
# empty folder $work that goes with them at the end.

work=$(mktemp -d /tmp/tk.XXXXXX) # short: Ray's sockets lie below, and their names may have 107 bytes
hosts=() # all that were made
addresses=(192.0.2.1 192.0.2.2) # of RFC 5737, which no network has

kill_node() { # NAMESPACE SIGNAL: all that runs there
    ip netns pids "$1" 2>/dev/null | xargs --no-run-if-empty kill "-$2" 2>/dev/null || true
}

finish() {
    local status=$? namespace
    trap - EXIT
    trap '' TERM INT # `timeout` sends two
    jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true # what would start more there
    for namespace in "${hosts[@]}"; do
        kill_node "$namespace" KILL
        ip netns delete "$namespace" 2>/dev/null || true
    done
    if ((status)); then tail -n 20 "$work"/*.log >&2 || true; fi
    rm -rf "$work" || true
    exit "$status"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

make_network() { # [NAME]: sets first and second to two new hosts, which see no others
    local namespace
    first=tongkuan-$$${1:+-$1}-first
    second=tongkuan-$$${1:+-$1}-second
    hosts+=("$first" "$second")
    ip netns add "$first"
    ip netns add "$second"
    ip link add "tk$$a" netns "$first" type veth peer name "tk$$b" netns "$second"
    ip -netns "$first" address add "${addresses[0]}/24" dev "tk$$a"
    ip -netns "$second" address add "${addresses[1]}/24" dev "tk$$b"
    for namespace in "$first" "$second"; do ip -netns "$namespace" link set lo up; done
    ip -netns "$first" link set "tk$$a" up
    ip -netns "$second" link set "tk$$b" up
    # Ray takes the address of a node by asking which would lead out.
    ip -netns "$first" route add default via "${addresses[1]}"
    ip -netns "$second" route add default via "${addresses[0]}"
}
