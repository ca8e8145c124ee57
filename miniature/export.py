"""Small weights to draw with, from one alpha of a run of demo.sh: no optimizers, no discriminator, half precision.

    bash miniature/demo.sh
    python miniature/export.py demo/alpha1                  # tokenizer.pt, ar.pt, nar.pt in miniature/weights
    python sample.py --prior miniature/weights/ar.pt --tokenizer miniature/weights/tokenizer.pt

The tokenizer is phase 2's. Its fingerprint is that of the rounded weights, and the priors are given it.
"""
import hashlib
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import runtime  # noqa: E402
from sample import load_pair  # noqa: E402
from train_tokenizer import fingerprint, load_tokenizer  # noqa: E402

PATHS = {"out", "init", "vgg", "tokenizer", "codes"}  # flags that name files of the run: nobody else has them


def main():
    parser = runtime.Parser(__doc__)
    parser.add_argument("run", help="folder of one alpha")
    parser.add_argument("--out", default="miniature/weights", help="where the weights go")
    args = parser.parse_args()
    run, out, sums = Path(args.run), Path(args.out), ""
    files = {"tokenizer": run / "phase2" / "ckpt.pt", "ar": run / "ar" / "best.pt", "nar": run / "nar" / "best.pt"}
    for name, path in files.items():
        if name != "tokenizer":
            load_pair(path, files["tokenizer"], "cpu")  # refuses what does not belong together
        state = runtime.load_file(path)
        state = {key: state[key] for key in state if key not in ("optimizer", "opt_g", "opt_d", "disc", "ema")}
        state |= {"model": {key: value.half() for key, value in state["model"].items()}, "ema": None, "disc": None}
        state["args"] = {flag: value for flag, value in state["args"].items() if flag not in PATHS}
        if name != "tokenizer":
            state["tokenizer"] = fingerprint(load_tokenizer(out / "tokenizer.pt"))
        runtime.save_file(out / f"{name}.pt", lambda file, state=state: torch.save(state, file))
        sums += f"{hashlib.sha256((out / f'{name}.pt').read_bytes()).hexdigest()}  {name}.pt\n"
    runtime.save_file(out / "SHA256SUMS", lambda file: file.write(sums.encode()))
    print(sums, end="")


if __name__ == "__main__":
    runtime.run(main)
