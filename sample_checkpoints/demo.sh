#!/usr/bin/env bash
# The lesson on parameters, from the shell: look, show, prove ties, change a number and see both names change.
set -euo pipefail
samples=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$samples"/*.pt "$samples"/*.safetensors "$work"
cd "$work"
exec 2>&1

run() {
    printf '\n$ ckpt'
    printf ' %q' "$@"
    printf '\n'
    ckpt "$@"
}

run ls -f table mlp.pt
run show mlp.pt 2
run show mlp.pt 2.bias '0.weight[0,:2]'
run ls -l -f table tied.pt
run ties -f table --equal tied.pt
run ties tied.pt 2.weight 4.weight
run set tied.pt '2.weight[0,0]=100'
run show tied.pt '4.weight[0,:3]'
run set tied.safetensors '2.weight[0,0]=100' -o edited.safetensors
run show edited.safetensors '4.weight[0,0]'
run ls -a -f table train.pt args meter epoch
run show train.pt epoch optimizer.param_groups.0.lr
run set train.pt 'model.0.bias=0' 'optimizer.*.exp_avg*=0.5'
run info -f table train.pt
