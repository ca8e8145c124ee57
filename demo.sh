#!/usr/bin/env bash
# The paper in miniature: tokenizers at alpha 0 and alpha 1, priors on their codes, samples, and the claims measured.
#
#     bash demo.sh                               # results in demo/; stop it when you like, run it again, it goes on
#     DEMO_SEED=1 DEMO_OUT=demo1 bash demo.sh    # another seed; several together: python figures.py demo demo1 demo2
#     DEMO_ALPHAS="0 0.4 1" bash demo.sh         # more tokenizers
#     DEMO_STEPS=20000 bash demo.sh              # a longer fit, for a GPU
#
# Pictures are 32 x 32 (8 x 8 codes, f = 4), networks have about a million parameters. Each alpha has a core of its own:
# on a CPU two processes of one thread each are far faster than one of two threads.
set -euo pipefail
cd "$(dirname "$0")"
out=${DEMO_OUT:-demo} seed=${DEMO_SEED:-0} alphas=${DEMO_ALPHAS:-0 1}
steps=${DEMO_STEPS:-1300}      # of phase 1; the other stages follow it
samples=${DEMO_SAMPLES:-1000}  # of each prior, and as many held-out pictures
lanes=$(python -c 'import os; print(os.cpu_count() or 1)')  # how many alphas at a time
export OMP_NUM_THREADS=1
mkdir -p "$out"

# --- how it is run: a stage is a command that is told of signals at once, saves, and ends all after it
child=""
stop() { trap '' INT TERM; for job in $child $(jobs -p); do kill -TERM "$job" 2> /dev/null || true; done; wait; exit 130; }
trap stop INT TERM
go() { "$@" & child=$!; wait "$child"; child=""; }
say() { printf '== %s\n' "$*"; }
finished() { [ -e "$1" ]; }

# --- what all training shares. Networks this small gain nothing from torch.compile.
common="--data shapes --workers 0 --no-compile --resume --log_every 100"
tokenizer="$common --image_size 32 --vgg $out/vgg/ckpt.pt --batch_size 16 --disc_channels 16 64 --r1 1 --val_n 500
           --eval_every 500 --save_every 200 --seed $seed"
prior="$common --classes 10 --size tiny --views 1 --batch_size 16 --iters $((steps * 12 / 10)) --lr 2e-3 --lr_end 1e-4
       --decay_start 0 --dropout 0 --eval_every 400 --save_every 200 --seed $seed"

# Networks that see: VGG16 knows photographs, not these pictures. Labels are finer than the classes (object x colour),
# for a network that needs no colour forgets it. One is for the loss; the other, of another seed, is the judge.
see() { go python train_vgg.py $common --labels fine --image_size 32 --widths 16 32 48 64 96 \
  --iters $((steps * 3 / 10)) --eval_every 200 --save_every 100 --seed "$1" --out "$out/$2"; }

# Distance of samples to five times as many training pictures in the judge's features, and the share that it takes for
# the object asked for.
judge() { finished "$2" || go python fid.py --real "$out/train.npz" --fake "$1" --features "$out/judge/ckpt.pt" \
  --workers 0 --json "$2"; }

lane() {  # everything about one alpha
  local alpha=$1 run=$out/alpha$1 phase kind draw
  trap stop INT TERM  # a subshell forgets its traps
  say "phase 1: encoder, codebook and decoder, Eq. 4 with alpha $alpha (about 8 minutes)"
  go python train_tokenizer.py $tokenizer --alpha "$alpha" --channels 16 32 64 --z_dim 32 --codebook_size 256 \
    --iters "$steps" --lr 1.5e-3 --lr_end 1e-4 --vq_start $((steps / 8)) --disc_start $((steps / 10)) \
    --disc_ramp $((steps / 5)) --out "$run/phase1"
  say "phase 2: encoder and codebook fixed; the decoder, with attention now, is finetuned with alpha 0 (2 minutes)"
  go python train_tokenizer.py $tokenizer --phase 2 --init "$run/phase1/ckpt.pt" --iters $((steps * 3 / 10)) \
    --lr 1e-3 --lr_end 1e-4 --out "$run/phase2"
  for phase in 1 2; do
    finished "$run/phase$phase.json" || go python fid.py --real shapes --n "$samples" --workers 0 \
      --tokenizer "$run/phase$phase/ckpt.pt" --features "$out/judge/ckpt.pt" --json "$run/phase$phase.json"
  done
  for kind in ar nar; do
    draw="--prior $run/$kind/best.pt --n $samples --batch_size 100"
    [ $kind = ar ] || draw="$draw --choice_temperature 4.5"  # MaskGIT's: better here than Table 10's 0.45
    say "the $kind prior on phase 1's codes, which are phase 2's as well (3 minutes)"
    go python train_prior.py $prior --kind $kind --tokenizer "$run/phase1/ckpt.pt" --codes "$run/codes" --out "$run/$kind"
    # the same sampled codes, decoded by either phase
    finished "$run/${kind}2/samples.npz" || go python sample.py $draw --tokenizer "$run/phase1/ckpt.pt" \
      "$run/phase2/ckpt.pt" --out "$run/${kind}1" "$run/${kind}2"
    for phase in 1 2; do judge "$run/$kind$phase/samples.npz" "$run/$kind$phase.json"; done
  done
}

began=$SECONDS
say "two networks that see: one for the loss, one that judges (2 minutes)"
(trap stop INT TERM; see 1 vgg) > "$out/vgg.log" 2>&1 & other=$!
see 2 judge
wait "$other" || { cat "$out/vgg.log"; exit 1; }
finished "$out/train.npz" || go python fid.py --real shapes --split train --n $((5 * samples)) --image_size 32 --workers 0 \
  --features "$out/judge/ckpt.pt" --save "$out/train.npz"

for alpha in $alphas; do
  while [ "$(jobs -rp | wc -l)" -ge "$lanes" ]; do sleep 1; done
  (lane "$alpha") 2>&1 | (trap '' INT TERM; while IFS= read -r line; do echo "alpha $alpha | $line"; done) &
done
wait  # a lane that failed has said why; figures.py then misses its files and ends this script with an error

say "what came out. One seed decides nothing:"
go python figures.py "$out"
say "README.md has the same over three seeds:"
sed -n '/^| 3 seed(s)/,/^| encoder and codebook/p' README.md
echo "done in $(((SECONDS - began) / 60)) minutes; look at $out/view.png, $out/samples.png and $out/phases.png"
