#!/bin/bash
# The agent in programs: preloaded, by library path, opened in every way, in programs without CUDA, on a machine without a
# driver.
set -euo pipefail
agent=$BENNU_AGENT
driver=$BENNU_DRIVER
prog=$1
linked=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
unset BENNU_DRIVER BENNU_SELF_REAL LD_LIBRARY_PATH

check() { # NAME EXPECTED COMMAND…
    local name=$1 expected=$2 got
    shift 2
    got=$("$@" 2>&1) || got="$got (exit status $?)"
    if [ "$got" != "$expected" ]; then
        printf 'FAIL %s\n  expected: %s\n  got:      %s\n' "$name" "$expected" "$got"
        failures=$((failures + 1))
    else
        echo "ok   $name"
    fi
}

# Programs that never touch CUDA: nothing is different.
for command in 'echo $((6*7)); type cd | head -1' 'exit 3' 'ulimit -n; umask; trap' 'ls /proc/self/fd | wc -l; ls /proc/self/task | wc -l'; do
    plain=$(bash -c "$command" 2>&1) || plain="$plain (exit status $?)"
    check "bash -c '$command'" "$plain" env LD_PRELOAD="$agent" bash -c "$command"
done
if command -v python3 >/dev/null; then
    code='import sys, os, threading, subprocess; print(sys.version); print(subprocess.run(["true"]).returncode, sorted(os.listdir("/proc/self/fd")), threading.active_count())'
    check 'python3 -c pass' '' env LD_PRELOAD="$agent" python3 -c pass
    check 'python3' "$(python3 -c "$code")" env LD_PRELOAD="$agent" python3 -c "$code"
fi

# CUDA programs, preloaded and by library path.
mkdir "$work/path"
cp "$agent" "$work/path/libcuda.so.1"
for how in local deepbind global twice rtld-default; do
    expected="$how b0b0b0b0"$'\n'agent
    check "preload, $how" "$expected" env BENNU_EXPECT_AGENT=1 BENNU_DRIVER="$driver" LD_PRELOAD="$agent" "$prog" "$how"
    check "library path, $how" "$expected" env BENNU_EXPECT_AGENT=1 BENNU_DRIVER="$driver" LD_LIBRARY_PATH="$work/path" "$prog" "$how"
done
expected="linked b0b0b0b0"$'\n'agent
check 'linked with -lcuda, preload' "$expected" env BENNU_EXPECT_AGENT=1 BENNU_DRIVER="$driver" LD_PRELOAD="$agent" \
    LD_LIBRARY_PATH="$(dirname "$driver")" "$linked" linked
check 'linked with -lcuda, library path' "$expected" env BENNU_EXPECT_AGENT=1 BENNU_DRIVER="$driver" \
    LD_LIBRARY_PATH="$work/path" "$linked" linked

# The driver is found by itself: behind the agent on the library path, and by its versioned name beside an agent that stands in
# its place.
cp -L "$driver" "$work/libcuda.so.1"
check 'driver on the library path' "local b0b0b0b0" env LD_PRELOAD="$agent" LD_LIBRARY_PATH="$work" "$prog" local
check 'two agents before the driver' "local b0b0b0b0" env LD_PRELOAD="$agent" LD_LIBRARY_PATH="$work/path:$work" "$prog" local
cp -L "$driver" "$work/path/libcuda.so.999.88.77"
check 'agent in the place of the driver' "local b0b0b0b0" env LD_LIBRARY_PATH="$work/path" "$prog" local
rm "$work/path/libcuda.so.999.88.77"
cp -L "$driver" "$work/hidden"
check 'driver kept elsewhere' "local b0b0b0b0" env BENNU_SELF_REAL="$work/hidden" LD_LIBRARY_PATH="$work/path" "$prog" local

# A driver that cannot be loaded, or none.
echo 'no library' >"$work/broken"
check 'unloadable driver' "cuInit: 100 (exit status 1)" env BENNU_DRIVER="$work/broken" LD_PRELOAD="$agent" "$prog" local
check 'the agent as its own driver' "cuInit: 100 (exit status 1)" env BENNU_DRIVER="$agent" LD_PRELOAD="$agent" "$prog" local
if ! ldconfig -p | grep -q 'libcuda\.so\.1'; then
    check 'no driver' "cuInit: 100 (exit status 1)" env LD_PRELOAD="$agent" "$prog" local
    nvcc=$(command -v nvcc || true)
    if [ -n "$nvcc" ] && "$nvcc" -o "$work/cudart" "$(dirname "$0")/cudart.cu" 2>/dev/null; then
        check 'static cudart without a driver' "$("$work/cudart")" env LD_PRELOAD="$agent" "$work/cudart"
    else
        echo 'skip static cudart: no nvcc'
    fi
fi

# A program that dies with the agent in it is no excuse for exit statuses or core files of ours.
check 'environment is left alone' "$agent" env LD_PRELOAD="$agent" bash -c 'echo $LD_PRELOAD'
exit $((failures ? 1 : 0))
