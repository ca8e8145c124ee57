"""Which sampling settings are best? sample.py over all combinations of some lists, fid.py over the results, one table.

    python benchmarks/sweep.py --sample="--prior runs/nar/ckpt.pt --tokenizer runs/p2/ckpt.pt --n 10000" \\
        --fid="--real train256.npz" --choice_temperature 0.45 1 2 4.5 9 --temperature 0.8 1 1.2 --out sweep

The same command continues after a stop: a combination that has its result is not made again. More values may be added.
Choose by a sweep with one --seed, and quote the number of another: the best of many is lucky in part.
"""
import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import runtime  # noqa: E402
from runtime import BadInput  # noqa: E402

NUMBERS = "FID", "FD", "sFID", "IS", "precision", "recall", "accuracy"  # the columns, where fid.py gives them


def run(script, *words):
    """One of the project's scripts in a process of its own, which prints what goes wrong."""
    if subprocess.run([sys.executable, str(ROOT / script), *map(str, words)]).returncode:
        raise BadInput(f"{script} failed as said above: the same command continues from here")


def main():
    parser = runtime.Parser(__doc__)
    add = parser.add_argument
    add("--sample", required=True, help='flags of sample.py, as one word: --sample="--prior ... --n ..."')
    add("--fid", required=True, help='flags of fid.py, as one word: --fid="--real ..."')
    add("--temperature", type=runtime.rate, nargs="+", help="values to try; likewise below")
    add("--choice_temperature", type=runtime.weight, nargs="+", help="NAR alone")
    add("--top_p", type=runtime.number(float, 0, 1, above=True), nargs="+", help="AR alone")
    add("--cfg", type=runtime.weight, nargs="+", help="guidance; the prior needs training with --label_dropout")
    add("--out", default="sweep", help="folder: a folder for each combination, and table.md")
    args = parser.parse_args()
    lists = {"temperature": args.temperature, "choice_temperature": args.choice_temperature, "top_p": args.top_p,
             "cfg": args.cfg}
    lists = {name: values for name, values in lists.items() if values}
    out, flags = Path(args.out), {"sample": shlex.split(args.sample), "fid": shlex.split(args.fid)}
    if not lists:
        raise BadInput("nothing to try: give values to --temperature, --choice_temperature, --top_p or --cfg")
    if (out / "flags.json").exists() and json.loads((out / "flags.json").read_text()) != flags:
        raise BadInput(f"{out} has a sweep with another --sample or --fid: choose another --out")
    runtime.save_json(out / "flags.json", flags)

    rows = []
    for values in itertools.product(*lists.values()):
        folder = out / "_".join(f"{name}-{value:g}" for name, value in zip(lists, values))
        words = [word for name, value in zip(lists, values) for word in (f"--{name}", value)]
        if not (folder / "samples.npz").exists():
            run("sample.py", *flags["sample"], *words, "--out", folder)
        if not (folder / "fid.json").exists():
            run("fid.py", *flags["fid"], "--fake", folder / "samples.npz", "--json", folder / "fid.json")
        rows.append((values, json.loads((folder / "fid.json").read_text())))

    names = [*lists, *(name for name in NUMBERS if name in rows[0][1])]
    lines = [names, ["---"] * len(names)]
    for values, result in rows:
        lines.append([f"{value:g}" for value in values] + [f"{result[name]:.4g}" for name in names[len(values):]])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    runtime.save_file(out / "table.md", lambda file: file.write(table.encode()))
    print(table + f"measured, first row: {rows[0][1]['measured']}")


if __name__ == "__main__":
    runtime.run(main)
