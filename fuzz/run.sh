#!/bin/sh
# Builds a fuzz target with the stable toolchain and runs it for some seconds.
#
#   fuzz/run.sh TARGET SECONDS [libFuzzer options]
#   fuzz/run.sh TARGET FILE     runs one input again, for example a crash
#   fuzz/run.sh --list          the targets' names
#   fuzz/run.sh --build         builds all of them
#
# The exit status is that of the fuzzer: not zero on a crash, a hang or too much memory. What broke
# it is left in fuzz/artifacts/TARGET, what it learnt in fuzz/corpus/TARGET.
set -eu

cd "$(dirname "$0")"
triple=x86_64-unknown-linux-gnu
build=${CARGO_TARGET_DIR:-$PWD/target}

targets() {
    sed -n 's/^name = "\([a-z0-9]*_[a-z]*\)"$/\1/p' Cargo.toml
}

compile() {
    RUSTFLAGS="-Cpasses=sancov-module \
-Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares \
-Ccodegen-units=1 --cfg fuzzing" \
        cargo build --quiet --release --target "$triple" --target-dir "$build" "$@"
}

case ${1:-} in
--list)
    targets
    exit
    ;;
--build)
    compile --bins
    exit
    ;;
esac

if [ $# -lt 2 ] || ! targets | grep -qx "$1"; then
    echo "usage: fuzz/run.sh TARGET SECONDS [libFuzzer options]; targets:" >&2
    targets >&2
    exit 2
fi
target=$1
seconds=$2
shift 2

compile --bin "$target"
if [ -f "$seconds" ]; then
    exec "$build/$triple/release/$target" "$seconds"
fi
mkdir -p "corpus/$target" "artifacts/$target"
seeds=
[ -d "seeds/$target" ] && seeds=seeds/$target
exec "$build/$triple/release/$target" \
    -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=4096 \
    -artifact_prefix="artifacts/$target/" -print_final_stats=1 -verbosity=1 \
    "$@" "corpus/$target" $seeds
