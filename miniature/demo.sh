#!/usr/bin/env bash
# The paper in miniature: tokenizers at alpha 0 and alpha 1 from a shared initial checkpoint, priors
# on their codes, samples.
#
#     bash miniature/demo.sh                               # results in demo/
#     DEMO_SEED=1 DEMO_OUT=demo1 bash miniature/demo.sh    # another seed
#     DEMO_SECOND=1 DEMO_OUT=noise bash miniature/demo.sh  # two priors of each kind: their noise
#     DEMO_ALPHAS="0 0.4 1" bash miniature/demo.sh         # more tokenizers
#     DEMO_CLUTTER=0 DEMO_OUT=demo_plain bash miniature/demo.sh    # no clutter
#     python miniature/figures.py demo demo1 demo2         # tables over several seeds
#
# You can stop it at any time: the same command resumes. docs/miniature.md lists the commands of its
# longer runs. Images are 32 x 32 (4 x 4 codes, f = 8), networks have about a million parameters.
# Each alpha uses one core: two processes with one thread each are faster than one process with two.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO_OUT:-demo} seed=${DEMO_SEED:-0} alphas=${DEMO_ALPHAS:-0 1}
clutter=${DEMO_CLUTTER:-1}  # 0: none; 1: any light and color, confetti
# Steps of the shared initial checkpoint. The tokenizers' other stages take a fraction of it.
steps=${DEMO_STEPS:-600}
priors=${DEMO_PRIORS:-$((steps * 2))}  # steps of an AR prior; a NAR prior takes four times as many
second=${DEMO_SECOND:-0}
samples=${DEMO_SAMPLES:-1000}  # per prior; metrics of reconstructions use as many validation images
# Choice temperature of NAR samples: the best of 0.45, 2, 4.5, 9 on seed 7.
temperature=${DEMO_TEMPERATURE:-9}
cores=$(python -c 'import os; print(os.cpu_count() or 1)')  # so many alphas train at a time
export OMP_NUM_THREADS=1
mkdir -p "$out"
command="DEMO_SEED=$seed DEMO_CLUTTER=$clutter DEMO_STEPS=$steps DEMO_PRIORS=$priors"
command="$command DEMO_SECOND=$second DEMO_SAMPLES=$samples DEMO_TEMPERATURE=$temperature"
command="$command bash miniature/demo.sh"
python - "$out/about.json" "$command" <<'END'
import json, os, platform, subprocess, sys
from pathlib import Path
path, command = Path(sys.argv[1]), sys.argv[2]
if path.exists():
    held = json.loads(path.read_text())["command"]
    sys.exit(0 if held == command else
             f"{path.parent} holds another run, {held}: choose another DEMO_OUT")
import torch  # takes seconds, and a resumed run does not need it
commit = subprocess.getoutput("git describe --always --dirty")
processor = subprocess.getoutput("sed -n '/^model name/ {s/.*: //p; q}' /proc/cpuinfo 2> /dev/null")
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
path.write_text(json.dumps({
    "command": command, "commit": commit, "processor": processor or platform.processor(),
    "cores": os.cpu_count(), "gpu": gpu, "torch": torch.__version__}))
END

# --- each stage runs as a background job, so that signals reach it immediately. It saves, and the
# script ends
child=""
stop() {
  trap '' INT TERM
  for pid in $child $(jobs -p); do kill -TERM "$pid" 2> /dev/null || true; done
  wait
  exit 130
}
trap stop INT TERM
run() { "$@" & child=$!; wait "$child"; child=""; }
log() { printf '== %s\n' "$*"; }
finished() { [ -e "$1" ]; }

# --- flags of all training stages. Networks as small as these gain nothing from torch.compile
data=shapes:clutter=$clutter
common="--data $data --image_size 32 --workers 0 --no-compile --resume --log_every 100"
tokenizer="$common --vgg $out/vgg/ckpt.pt --batch_size 16 --eval_every 250 --seed $seed"
# In the paper the perceptual loss dominates L1, as raw VGG16 features are large. The layers of our
# small network are divided by their variance; with L1 at weight 0.5 the two layers of alpha 1
# dominate as well. There is no discriminator: one that learns from a few thousand small batches
# draws stripes and false colors (docs/LOG.md).
weights="--l1_weight 0.5 --adv_weight 0"
# With batches of 16 at a learning rate of 2e-3 a NAR prior never learns to use the other codes
# (docs/LOG.md).
prior="$common --size tiny --views 1 --batch_size 64 --lr 1e-3 --lr_end 1e-4 --decay_start 0"
prior="$prior --dropout 0"

# The network of the loss, and an independent one for evaluation. Both learn to classify the parts
# of the monsters.
classifier() {
  run python miniature/train_vgg.py $common --iters $((steps * 3 / 4)) --eval_every 250 \
    --seed "$1" --out "$out/$2"
}

# FD between samples and five times as many training images, in the features of the independent
# network.
evaluate() {
  finished "$2" || run python fid.py --real "$out/train.npz" --fake "$1" \
    --feature_net "$out/classifier/ckpt.pt" --workers 0 --json "$2"
}

job() {  # everything about one alpha
  local alpha=$1 folder=$out/alpha$1 phase kind name options
  trap stop INT TERM  # a subshell does not inherit traps
  log "phase 1: from the shared initial checkpoint, Eq. 4 with alpha $alpha"
  run python train_tokenizer.py $tokenizer $weights --init "$out/start/ckpt.pt" --alpha "$alpha" \
    --iters $((steps * 3 / 4)) --lr 1e-3 --lr_end 1e-4 --out "$folder/phase1"
  log "phase 2: encoder and codebook are frozen; the decoder, now with attention, is finetuned at" \
    "alpha 0"
  run python train_tokenizer.py $tokenizer --phase 2 --init "$folder/phase1/ckpt.pt" \
    --iters $((steps / 2)) --lr 1e-3 --lr_end 1e-4 --l1_weight 1 --out "$folder/phase2"
  for phase in 1 2; do
    finished "$folder/phase$phase.json" || run python fid.py --real "$data" --split val \
      --count "$samples" --workers 0 --tokenizer "$folder/phase$phase/ckpt.pt" \
      --feature_net "$out/classifier/ckpt.pt" --json "$folder/phase$phase.json"
  done
  local names="ar nar"
  [ "$second" = 0 ] || names="$names ar_second nar_second"
  for name in $names; do
    kind=${name%_second} iters=$priors
    [ $kind = ar ] || iters=$((priors * 4))
    log "a $kind prior on phase 1's codes, which phase 2 shares"
    run python train_prior.py $prior --kind $kind --tokenizer "$folder/phase1/ckpt.pt" \
      --code_cache "$folder/codes" --iters "$iters" --eval_every $((iters / 10)) \
      --seed $((seed + 100 * (${#name} > 3))) --out "$folder/$name"
    options="--prior $folder/$name/best.pt --count $samples --batch_size 100"
    [ $kind = ar ] || options="$options --choice_temperature $temperature"
    for phase in 1 2; do  # the same sampled codes, decoded by either phase
      finished "$folder/$name$phase/samples.npz" || run python sample.py $options \
        --tokenizer "$folder/phase$phase/ckpt.pt" --out "$folder/$name$phase"
      evaluate "$folder/$name$phase/samples.npz" "$folder/$name$phase.json"
    done
  done
}

began=$SECONDS
log "two small classifiers: the network of the loss, and another one for evaluation"
(trap stop INT TERM; classifier 1 vgg) > "$out/vgg.log" 2>&1 & other=$!
classifier 2 classifier
wait "$other" || { cat "$out/vgg.log"; exit 1; }
finished "$out/train.npz" || run python fid.py --real "$data" --split train \
  --count $((5 * samples)) --image_size 32 --workers 0 --feature_net "$out/classifier/ckpt.pt" \
  --save "$out/train.npz"
log "the shared initial checkpoint: a tokenizer at alpha 0"
run python train_tokenizer.py $tokenizer $weights --alpha 0 --channels 16 32 64 64 --z_dim 32 \
  --codebook_size 256 --iters "$steps" --lr 1.5e-3 --lr_end 1e-3 --vq_warmup $((steps / 10)) \
  --out "$out/start"

for alpha in $alphas; do
  while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do sleep 1; done
  (job "$alpha") 2>&1 |
    (trap '' INT TERM; while IFS= read -r line; do echo "alpha $alpha | $line"; done) &
done
wait  # a failed job has printed its error; figures.py then fails on the missing files

log "results of one seed, with short runs; docs/miniature.md has three seeds and longer runs:"
run python miniature/figures.py "$out"
echo "done in $(((SECONDS - began) / 60)) minutes; look at $out/view.png, $out/samples.png and" \
  "$out/phases.png"
