#!/usr/bin/env bash
# Train exported_scripts/train_gpt.py (record 82's recipe) on the GPUs of this machine; `run.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: run.sh [options of train_gpt.py]

Fetches the training data if they are missing, then trains on 8, 4, 2 or 1 GPUs: as many as there are.
The batch is the same for every number. All options go to the training script, for example

  run.sh --out runs/first --seed 1
  run.sh --out runs/first --seed 1 --resume
  run.sh --size mini

`python exported_scripts/train_gpt.py --help` lists them. A folder that holds a run is never overwritten.

environment:
  CUDA_VISIBLE_DEVICES  GPUs to use (default: all)
  DATA_PATH             shards are in $DATA_PATH/data/fineweb10B (default: the repository)
  NUM_SHARDS            training shards to fetch, 200 MB each (default: what the recipe reads: full 5, mini 2);
                        with fewer, the loader starts again at the first
  HF_ENDPOINT           another address of the Hugging Face hub
  SPEEDRUN_ATTENTION    fa3, fa4, fa2, flex or reference (default: the best that this GPU can run)
  SPEEDRUN_FP8          1 or 0 (default: 1 where the GPU can)
  SPEEDRUN_REPLAY       1 or 0: launch every kernel by itself, which needs less memory (default: 1)
TEXT
}

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

has() { command -v "$1" >/dev/null; }

root=$(dirname -- "$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")")
script=$root/exported_scripts/train_gpt.py

# Only what decides about folders is read here; argparse takes --name value, --name=value and shortened names.
size=full seed=0 out='' data='' resume='' name=''
for word in "$@"; do
  case $word in
    -h | --h*) usage; exit 0 ;;
    --*=*) name=${word%%=*} value=${word#*=} ;;
    --*) name=$word value='' ;;
    *) value=$word ;;
  esac
  case $name in
    --si*) size=$value ;;
    --se*) seed=$value ;;
    --o*) out=$value ;;
    --da*) data=$value ;;
    --r*) resume=yes ;;
  esac
done

# Shards: tokens of all steps / (100M * the share that rows keep); tests/test_launch.py computes them from the recipe.
case $size in
  nano) folder=demo_bytes shards=1 get=(demo) ;;
  mini) folder=fineweb10B shards=${NUM_SHARDS:-2} get=(fineweb --shards "${NUM_SHARDS:-2}") ;;
  full) folder=fineweb10B shards=${NUM_SHARDS:-5} get=(fineweb --shards "${NUM_SHARDS:-5}") ;;
  *) die "--size is '$size'; it must be nano, mini or full" ;;
esac
[[ $shards =~ ^[1-9][0-9]*$ ]] || die "NUM_SHARDS is '$shards'; it must be a whole number, 1 or more"

out=${out:-runs/train_gpt-$size-seed$seed} # the script's own default
if [[ -n $resume ]]; then
  [[ -e $out/checkpoint.safetensors ]] || die "there is no checkpoint in $out; leave out --resume or name another --out"
elif [[ -s $out/log.jsonl ]]; then
  advice="it has no checkpoint: delete it"
  [[ ! -e $out/checkpoint.safetensors ]] || advice="add --resume to continue it"
  die "$out already holds a run; $advice or name another --out"
fi

# nvidia-smi does not look at CUDA_VISIBLE_DEVICES; CUDA ends that list at the first -1.
has nvidia-smi || die "no nvidia-smi, so no NVIDIA driver; without a GPU: python exported_scripts/train_gpt.py --size nano"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
  IFS=, read -r -a listed <<<"$CUDA_VISIBLE_DEVICES"
  chosen=0
  for device in "${listed[@]}"; do
    [[ $device != -1 ]] || break
    chosen=$((chosen + 1))
  done
  ((chosen >= gpus)) || gpus=$chosen
fi
processes=0
for count in 1 2 4 8; do
  ((count > gpus)) || processes=$count
done
((processes)) || die "no GPU to use (nvidia-smi, CUDA_VISIBLE_DEVICES); without one: python exported_scripts/train_gpt.py --size nano"
has torchrun || die "no torchrun; install the package: pip install -e '${root}[gpu]'"

export DATA_PATH=${DATA_PATH:-$root}
if [[ -z $data ]]; then
  files=$DATA_PATH/data/$folder
  train=$(compgen -G "$files/*_train_*.bin" | wc -l || true)
  if ((train < shards)) || ! compgen -G "$files/*_val_*.bin" >/dev/null; then
    has speedrun || die "no data in $files and no speedrun to fetch them; install the package: pip install -e '${root}[gpu]'"
    speedrun data get "${get[@]}" || die "the data did not come (see above); run again to continue, or set NUM_SHARDS"
  fi
fi

echo "training on $processes of $gpus GPUs into $out"
exec torchrun --standalone --nproc_per_node="$processes" "$script" "$@"
