"""Export small weights for sampling from one alpha of a run of demo.sh, in half precision.

    python miniature/export.py demo/alpha1     # tokenizer.pt, ar.pt, nar.pt in miniature/weights

The tokenizer is that of phase 2. Rounding changes its fingerprint, so the priors store the new one.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import vq  # noqa: E402
from losses import sha256  # noqa: E402

KEPT = ("component", "step", "torch", "config", "grid", "classes", "tokenizer")
PATHS = ("out", "init", "vgg", "tokenizer", "code_cache")  # flags that name files of this machine


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of one alpha, with phase2/, ar/ and nar/")
    parser.add_argument("--out", default="miniature/weights",
                        help="output folder; default: miniature/weights")
    args = parser.parse_args()
    out, sums = Path(args.out), ""
    out.mkdir(parents=True, exist_ok=True)
    files = {"tokenizer": "phase2/ckpt.pt", "ar": "ar/best.pt", "nar": "nar/best.pt"}
    for name, path in files.items():
        state = torch.load(Path(args.run) / path, map_location="cpu", weights_only=True)
        flags = {flag: value for flag, value in state["args"].items() if flag not in PATHS}
        weights = {key: value.half() for key, value in state["model"].items()}
        small = {key: state[key] for key in KEPT if key in state}
        small |= {"args": flags, "model": weights}
        if name != "tokenizer":
            small["tokenizer"] = vq.fingerprint(vq.load_tokenizer(out / "tokenizer.pt")[0])
        torch.save(small, out / f"{name}.pt")
        sums += f"{sha256(out / f'{name}.pt')}  {name}.pt\n"
    (out / "SHA256SUMS").write_text(sums)
    print(sums, end="")


if __name__ == "__main__":
    main()
