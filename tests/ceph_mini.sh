#!/bin/bash
# A Ceph object store on loopback for the S3 tests: one monitor, one OSD that keeps its data in RAM,
# one radosgw. Ready in 2-4 s. Access key `test`, secret `testsecret`.
#
#   ceph_mini.sh start DIR PORT MONITOR_PORT     everything it writes lies below DIR
#   ceph_mini.sh stop DIR
set -euo pipefail

START_SECONDS=150

fail() {
    echo "ceph_mini.sh: $1" >&2
    exit 1
}

need_programs() {
    local program
    for program in ceph ceph-mon ceph-osd monmaptool radosgw radosgw-admin curl; do
        command -v "$program" >/dev/null ||
            fail "$program is not installed: apt-get install radosgw ceph-mon ceph-osd curl"
    done
}

# What makes it small and quick: no authentication between the daemons (the S3 side checks its
# signatures all the same), one placement group a pool, decisions of the monitor without its pauses.
write_conf() {
    local dir=$1 port=$2 monitor=$3 fsid=$4
    cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:$monitor]
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv4 = true
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
mon allow pool size one = true
mon max pg per osd = 2000
mon data avail warn = 1
mon data avail crit = 1
mon tick interval = 1
paxos propose interval = 0.05
paxos min wait = 0.01
run dir = $dir
pid file = $dir/\$name.pid
admin socket = $dir/\$name.asok
log file = $dir/\$name.log
mon data = $dir/mon.\$id
osd data = $dir/osd.\$id
[client.rgw]
ms mon client mode = crc
rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port tcp_nodelay=1
rgw thread pool size = 32
rgw enable usage log = false
rgw relaxed s3 bucket names = true
rgw dns name =
CONF
}

start() {
    local dir=$1 port=$2 monitor=127.0.0.1:$3 fsid osd
    need_programs
    mkdir -p "$dir/mon.a" "$dir/osd.0" "$dir/rgw"
    fsid=$(cat /proc/sys/kernel/random/uuid)
    osd=$(cat /proc/sys/kernel/random/uuid)
    write_conf "$dir" "$port" "$monitor" "$fsid"
    export CEPH_CONF=$dir/ceph.conf
    # Their words go to a file, not to the test's output; it is shown where one of them fails.
    if ! {
        monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:$monitor]" "$dir/monmap" &&
            ceph-mon -i a --mkfs --monmap "$dir/monmap" &&
            ceph-mon -i a &&
            timeout "$START_SECONDS" ceph osd new "$osd" &&
            ceph-osd -i 0 --mkfs --osd-uuid "$osd" &&
            ceph-osd -i 0 &&
            timeout "$START_SECONDS" radosgw-admin -n client.rgw user create --uid=test \
                --display-name=test --access-key=test --secret=testsecret &&
            radosgw -n client.rgw
    } >"$dir/start.log" 2>&1 </dev/null; then
        tail -n 20 "$dir/start.log" >&2
        stop "$dir"
        fail "a daemon did not start; its words stand above and in $dir"
    fi
    until curl --silent --max-time 5 --output /dev/null "http://127.0.0.1:$port/"; do
        # radosgw goes to the background before it writes its process id down and binds its port.
        if { [[ -s $dir/client.rgw.pid ]] && ! kill -0 "$(cat "$dir/client.rgw.pid")" 2>/dev/null; } ||
            ((SECONDS > START_SECONDS)); then
            grep -h ' -1 ' "$dir/client.rgw.log" >&2 || true
            stop "$dir"
            fail "radosgw does not answer on port $port; see $dir"
        fi
        sleep 0.05
    done
}

# Ends the daemons by the process ids they wrote down, and waits until they are gone.
stop() {
    local dir=$1 name pid
    local -A running=()
    for name in client.rgw osd.0 mon.a; do
        [[ -s $dir/$name.pid ]] || continue
        running[$name]=$(cat "$dir/$name.pid")
        # Nothing of theirs need be kept, and radosgw takes 30 s to end in peace.
        kill -KILL "${running[$name]}" 2>/dev/null || true
        rm "$dir/$name.pid"
    done
    for name in "${!running[@]}"; do
        pid=${running[$name]}
        timeout 60 tail --pid="$pid" --sleep-interval=0.05 -f /dev/null ||
            fail "$name (process $pid) does not end"
    done
}

case ${1:-} in
    start) [[ $# == 4 ]] || fail "start: expected DIR PORT MONITOR_PORT" && start "$2" "$3" "$4" ;;
    stop) [[ $# == 2 ]] || fail "stop: expected DIR" && stop "$2" ;;
    *) fail "expected start or stop" ;;
esac
