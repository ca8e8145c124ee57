#!/usr/bin/env bash
# The miniature on emoji of four vendors, one seed: the commands behind the entries in docs/LOG.md.
# Needs npm.
#
#     bash miniature/emoji.sh      # writes emoji/, runs/ and samples-*/
set -euo pipefail
shopt -s nullglob
for v in twitter google apple facebook; do
  npm pack emoji-datasource-$v@15.1.2 && tar -xzf emoji-datasource-$v-15.1.2.tgz
  for f in package/img/$v/64/*.png; do
    n=$(basename "$f" .png)
    case $n in *-1f3f[b-f]*) continue ;; esac  # skin tones
    mkdir -p "emoji/${n^^}" && mv "$f" "emoji/${n^^}/$v.png"
  done
done
rm -r emoji/1F46[89]-200D-2764-200D-* emoji/1F9B[0-3]  # duplicates, and parts of other emoji

common="--data emoji --image_size 32 --crop resized --no-compile"
for s in 1 2; do
  python miniature/train_vgg.py $common --fgsm_eps 0 --iters 6000 --seed $s --out runs/net$s
done
python fid.py --real emoji --split train --image_size 32 --feature_net runs/net2/ckpt.pt \
  --save train.npz
tokenizer="$common --vgg runs/net1/ckpt.pt --batch_size 16 --eval_every 250 --l1_weight 0.1"
tokenizer="$tokenizer --adv_weight 0.02"
python train_tokenizer.py $tokenizer --alpha 0 --channels 16 32 64 --z_dim 32 --codebook_size 256 \
  --disc_channels 16 64 --iters 1500 --lr 1.5e-3 --lr_end 1e-3 --vq_warmup 150 --disc_warmup 750 \
  --out runs/start
for a in 0 1; do
  python train_tokenizer.py $tokenizer --init runs/start/ckpt.pt --alpha $a --iters 1000 --lr 1e-3 \
    --lr_end 1e-4 --out runs/phase1-$a
  python train_tokenizer.py $tokenizer --phase 2 --init runs/phase1-$a/ckpt.pt --iters 500 \
    --lr 1e-3 --lr_end 1e-4 --l1_weight 1 --adv_weight 0.1 --out runs/phase2-$a
  python train_prior.py $common --tokenizer runs/phase1-$a/ckpt.pt --size tiny --batch_size 64 \
    --lr 1e-3 --lr_end 1e-4 --decay_start 0 --iters 4000 --eval_every 500 --out runs/ar-$a
  for t in phase1-$a phase2-$a; do
    python fid.py --real emoji --split val --tokenizer runs/$t/ckpt.pt \
      --feature_net runs/net2/ckpt.pt
    python sample.py --prior runs/ar-$a/best.pt --tokenizer runs/$t/ckpt.pt --count 1903 \
      --batch_size 100 --out samples-$t
    python fid.py --real train.npz --fake samples-$t --feature_net runs/net2/ckpt.pt
  done
done
