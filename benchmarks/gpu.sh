#!/bin/sh
# On a bare machine with one GPU, python3 and torch, and no network: everything that docs/scale.md wants to know.
#
#   benchmarks/gpu.sh PART [OUT]        each part fits in nine minutes and leaves what it found in OUT (runs/gpu)
#   benchmarks/gpu.sh all [OUT]         all of them, one after the other, past those that fail
#
# install   wheels of WHEELS (the project's own and what it needs) into OUT/site, from where the other parts import it;
#           without WHEELS the checkout is used, with what python3 has
# tests     those that need a GPU, and the compiler held to what is written
# xl, xl-compiled, b, b-compiled      throughput and utilisation of XL/2 and B/2: gpu_xl2.py
# mnist, mnist-judges, mnist-eval, mnist-steering
#                     2,500 + 3,000 steps of the recipe (MNIST: its four IDX files), its classifiers, Fréchet distances,
#                     mfm bench, the class mixture
# images, images-eval 2,000 + 1,500 steps on 32×32 pictures (PICTURES: a folder or an .npz) by a U-Net of 5 M parameters
#
# DEVICE=cpu QUICK=1 rehearses a part: tiny tables, two small steps of each training (minutes on a core); SAY=1 says what would run.
set -eu
parts="install tests xl xl-compiled b b-compiled mnist mnist-judges mnist-eval mnist-steering images images-eval"
part=${1:?"say a part: $parts, or all"}
out=${2:-runs/gpu}
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3} device=${DEVICE:-cuda} quick=${QUICK:-} xl=XL b=B
[ -z "$quick" ] || xl=nano b=nano
steps() { # DRIFT MAP
    if [ -n "$quick" ]; then echo "--set drift_steps=2 --set steps=2 --set batch_size=8 --set drift_batch_size=8"
    else echo "--set drift_steps=$1 --set steps=$2"; fi
}
mkdir -p "$out"
out=$(cd "$out" && pwd)
if [ -d "$out/site" ]; then export PYTHONPATH="$out/site:$here${PYTHONPATH:+:$PYTHONPATH}"
else export PYTHONPATH="$here/src:$here${PYTHONPATH:+:$PYTHONPATH}"; fi

run() { # NAME COMMAND…: within nine minutes, its log beside its figures
    name=$1; shift
    if [ -n "${SAY:-}" ]; then echo "$name: $*"; return; fi
    code=0
    timeout 540 "$@" >"$out/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || { tail -n 5 "$out/$name.log" >&2; echo "$name ended with $code: see $out/$name.log" >&2; exit $code; }
    echo "$name: done"
}
mfm() { name=$1; shift; run "$name" "$python" -m metaflowmaps.cli "$@" --device "$device"; }
table() { # NAME SIZE [OPTION…]
    name=$1 size=$2; shift 2
    # shellcheck disable=SC2086  # words
    run "$name" "$python" -m benchmarks.gpu_xl2 --size "$size" --device "$device" --budget 450 \
        --json "$out/$name.json" ${quick:+--quick --parts ceiling forward} "$@"
}
small() { # in files that travel
    [ -n "${SAY:-}" ] || tar -cf - -C "$out" "$1/checkpoints" | split -b 16000000 - "$out/$1.tar-"
}
data() { [ -n "$2" ] || { echo "$part needs $1, the data it trains on" >&2; exit 2; }; }

case $part in
all) # what one part lacks is no reason to leave the next out; without what is installed none runs
    code=0
    for each in $parts; do
        sh "$0" "$each" "$out" || { code=$?; [ "$each" != install ] || exit $code; }
    done
    exit $code ;;
install)
    [ -n "${WHEELS:-}" ] || exit 0
    run install "$python" -m pip install --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl ;;
tests)
    cd "$here"
    run tests "$python" -m pytest -p no:cacheprovider -m 'gpu or attack' tests/networks ${quick:+--collect-only} ;;
xl) table xl "$xl" ;;
xl-compiled) table xl-compiled "$xl" --compile ;;
b) table b "$b" --batch 1024 ;;
b-compiled) table b-compiled "$b" --batch 1024 --compile ;;
mnist)
    data MNIST "${MNIST:-}"
    # shellcheck disable=SC2046  # words
    mfm mnist train mnist --data "$MNIST" --out "$out/mnist" $(steps 2500 3000)
    small mnist ;;
mnist-judges)
    data MNIST "${MNIST:-}"
    for each in judge guide; do
        mfm "mnist-$each" train "mnist-$each" --data "$MNIST" --out "$out/mnist-$each" ${quick:+--max-steps 2}
    done ;;
mnist-eval)
    mfm mnist-posterior eval posterior "$out/mnist" --out "$out/mnist-posterior" --set judge="$out/mnist-judge"
    mfm mnist-bench bench "$out/mnist" --precision bf16 --out "$out/mnist-bench" ;;
mnist-steering)
    mfm mnist-steering eval steering "$out/mnist" --task class-mixture --out "$out/mnist-steering" \
        --set judge="$out/mnist-judge" --set guide="$out/mnist-guide" ;;
images)
    data PICTURES "${PICTURES:-}"
    # shellcheck disable=SC2046  # words
    mfm images train images --data "$PICTURES" --out "$out/images" --set batch_size=256 --set drift_batch_size=256 \
        $(steps 2000 1500) --set precision=bf16 \
        --set 'model.network={"name": "unet", "width": 64, "multipliers": [1, 2, 3], "blocks": 2, "attention": [8]}'
    small images ;;
images-eval)
    mfm images-generation eval generation "$out/images" --out "$out/images-generation" --samples 2048
    mfm images-bench bench "$out/images" --precision bf16 --out "$out/images-bench" ;;
*) echo "no part is called $part: see the head of $0" >&2; exit 2 ;;
esac
