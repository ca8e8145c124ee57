#!/usr/bin/env bash
# The paper in miniature: tokenizers at alpha 0 and alpha 1, priors on their codes, samples, and the claims measured.
#
#     bash miniature/demo.sh                               # results in demo/
#     DEMO_SEED=1 DEMO_OUT=demo1 bash miniature/demo.sh    # another seed
#     DEMO_ALPHAS="0 0.4 1" bash miniature/demo.sh         # more tokenizers
#     DEMO_STEPS=3000 bash miniature/demo.sh               # the length of docs/miniature.md: an hour
#     DEMO_STEPS=20000 bash miniature/demo.sh              # a longer fit, for a GPU
#     python miniature/figures.py demo demo1 demo2         # the tables over several seeds
#
# Stop it when you like: the same command goes on.
# Pictures are 32 x 32 (8 x 8 codes, f = 4), networks have about a million parameters. Each alpha has a core of its own:
# on a CPU two processes of one thread each are far faster than one of two threads.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${DEMO_OUT:-demo} seed=${DEMO_SEED:-0} alphas=${DEMO_ALPHAS:-0 1}
steps=${DEMO_STEPS:-1200}      # of phase 1; the other stages follow it
samples=${DEMO_SAMPLES:-1000}  # of each prior, and as many held-out pictures
cores=$(python -c 'import os; print(os.cpu_count() or 1)')  # how many alphas at a time
export OMP_NUM_THREADS=1
mkdir -p "$out"

# --- how it is run: a stage is a command that is told of signals at once, saves, and ends all after it
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

# --- what all training shares. Networks this small gain nothing from torch.compile.
common="--data shapes --workers 0 --no-compile --resume --log_every 100"
tokenizer="$common --image_size 32 --vgg $out/vgg/ckpt.pt --batch_size 16 --disc_channels 16 64 --val_n 500
           --eval_every 500 --save_every 200 --seed $seed"
prior="$common --size tiny --views 1 --batch_size 16 --iters $((steps * 16 / 10)) --lr 2e-3 --lr_end 1e-4
       --decay_start 0 --dropout 0 --eval_every 400 --save_every 200 --seed $seed"

# The perceptual network and the evaluation classifier: VGG16 is made for photographs, not for these pictures. Labels
# are finer than the classes (object x colour), for a network that needs no colour forgets it.
train_classifier() { run python miniature/train_vgg.py $common --labels fine --image_size 32 --widths 16 32 48 64 96 \
  --iters $((steps * 3 / 10)) --eval_every 200 --save_every 100 --seed "$1" --out "$out/$2"; }

# FD of samples to five times as many training pictures in the evaluation classifier's features, and the share that it
# takes for the object asked for.
evaluate() { finished "$2" || run python fid.py --real "$out/train.npz" --fake "$1" \
  --features "$out/classifier/ckpt.pt" --workers 0 --json "$2"; }

job() {  # everything about one alpha
  local alpha=$1 folder=$out/alpha$1 phase kind options
  trap stop INT TERM  # a subshell forgets its traps
  log "phase 1: encoder, codebook and decoder, Eq. 4 with alpha $alpha (about 8 minutes)"
  run python train_tokenizer.py $tokenizer --alpha "$alpha" --channels 16 32 64 --z_dim 32 --codebook_size 256 \
    --iters "$steps" --lr 1.5e-3 --lr_end 1e-4 --vq_start $((steps / 8)) --disc_start $((steps / 10)) \
    --disc_ramp $((steps / 5)) --out "$folder/phase1"
  log "phase 2: encoder and codebook fixed; the decoder, with attention now, is finetuned with alpha 0 (2 minutes)"
  run python train_tokenizer.py $tokenizer --phase 2 --init "$folder/phase1/ckpt.pt" --iters $((steps * 3 / 10)) \
    --lr 1e-3 --lr_end 1e-4 --out "$folder/phase2"
  for phase in 1 2; do
    finished "$folder/phase$phase.json" || run python fid.py --real shapes --n "$samples" --workers 0 \
      --tokenizer "$folder/phase$phase/ckpt.pt" --features "$out/classifier/ckpt.pt" --json "$folder/phase$phase.json"
  done
  for kind in ar nar; do
    options="--prior $folder/$kind/best.pt --n $samples --batch_size 100"
    [ $kind = ar ] || options="$options --choice_temperature 4.5"  # MaskGIT's: better here than Table 10's 0.45
    log "the $kind prior on phase 1's codes, which are phase 2's as well (3 minutes)"
    run python train_prior.py $prior --kind $kind --tokenizer "$folder/phase1/ckpt.pt" --codes "$folder/codes" \
      --out "$folder/$kind"
    # the same sampled codes, decoded by either phase
    finished "$folder/${kind}2/samples.npz" || run python sample.py $options --tokenizer "$folder/phase1/ckpt.pt" \
      "$folder/phase2/ckpt.pt" --out "$folder/${kind}1" "$folder/${kind}2"
    for phase in 1 2; do evaluate "$folder/$kind$phase/samples.npz" "$folder/$kind$phase.json"; done
  done
}

began=$SECONDS
log "two small classifiers: the perceptual network of the loss, and another to evaluate with (2 minutes)"
(trap stop INT TERM; train_classifier 1 vgg) > "$out/vgg.log" 2>&1 & other=$!
train_classifier 2 classifier
wait "$other" || { cat "$out/vgg.log"; exit 1; }
finished "$out/train.npz" || run python fid.py --real shapes --split train --n $((5 * samples)) --image_size 32 \
  --workers 0 --features "$out/classifier/ckpt.pt" --save "$out/train.npz"

for alpha in $alphas; do
  while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do sleep 1; done
  (job "$alpha") 2>&1 | (trap '' INT TERM; while IFS= read -r line; do echo "alpha $alpha | $line"; done) &
done
wait  # a job that failed has said why; figures.py then misses its files and ends this script with an error

log "what came out. One seed decides nothing:"
run python miniature/figures.py "$out"
if grep -qs '^| 3 seed(s)' docs/miniature.md; then
  log "docs/miniature.md has the same over three seeds, of noisier pictures at 1,300 steps:"
  sed -n '/^| 3 seed(s)/,/^| encoder and codebook/p' docs/miniature.md
fi
echo "done in $(((SECONDS - began) / 60)) minutes; look at $out/view.png, $out/samples.png and $out/phases.png"
