"""The long trials: runs killed at random moments, damaged files, an hour of small jobs in a loop. CPU only.

    python tests/trials.py --kills 50 --fuzz 300 --soak 3600        # prints a table; about two hours on one core

test_faults.py runs a few of each. Jobs run in forks of this process, which has imported PyTorch already: a start takes
no seconds then, and the moments of the kills fall into the work instead.
"""
import argparse
import gc
import importlib
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import conftest  # noqa: E402, F401 (our folders on sys.path)
import numpy as np  # noqa: E402
import torch  # noqa: E402
import train_vgg  # noqa: E402, F401
from test_prior import save_prior, save_tokenizer  # noqa: E402
from test_train_tokenizer import same  # noqa: E402

import data  # noqa: E402
import fid  # noqa: E402
import losses  # noqa: E402
import runtime  # noqa: E402
import sample  # noqa: E402
import train_prior  # noqa: E402, F401 (imported here, not in each fork)
import train_tokenizer  # noqa: E402
from miniature.shapes import Shapes, draw  # noqa: E402
from runtime import BadInput  # noqa: E402

torch.set_num_threads(1)
TRAIN = "--image_size 16 --iters 9 --batch_size 4 --log_every 2 --eval_every 3 --save_every 1 --device cpu --resume"
TOKENIZER = (f"train_tokenizer.py {TRAIN} --channels 16 16 --z_dim 8 --codebook_size 16 --disc_channels 8 8 "
             f"--disc_ramp 2 --r1_every 2 --ema 0.9 --val_n 4")
PRIOR = TRAIN.replace("--image_size 16", "") + " --size tiny --ema 0.9 --workers 0"


# ----------------------------------------------------------------------------------------------- jobs in forks

def start(job, log):
    """Run job(), a function or a command line of ours, in a fork; its output goes to `log`. Returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if isinstance(job, str):
            sys.argv = job.split()
            runtime.run(importlib.import_module(sys.argv[0][:-3]).main)
        else:
            job()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def end(pid, seconds=300):
    """Wait for a process: its exit code, minus the signal's number, or "hangs"."""
    for _ in range(int(seconds * 100)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"


def whole(job, log):
    began, code = time.monotonic(), end(start(job, log))
    if code:
        raise SystemExit(f"{job}: {code}\n{Path(log).read_text()}")
    return time.monotonic() - began


# --------------------------------------------------------------------------------------------------- the kills

def metrics(folder, split=None):
    """The lines of metrics.jsonl. Raises ValueError if one is none, but for a last one that is being written."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if split in (None, line["split"])]


def trained(a, b):
    """Whether two run folders hold the same weights, to the bit, and the same validation lines."""
    files = ["ckpt.pt"] + ["best.pt"] * (Path(a) / "best.pt").exists()
    one, two = ([torch.load(Path(folder) / file, weights_only=True) for file in files] for folder in (a, b))
    for state in (*one, *two):
        del state["args"]
    return same(one, two) and metrics(a, "val") == metrics(b, "val")


def cached(a, b):
    """Whether their code caches are the same, too."""
    one, two = ({path.relative_to(folder): path.read_bytes() for path in Path(folder).glob("codes/*/*.npy")}
                for folder in (a, b))
    return len(one) == 4 and one == two and trained(a, b)


def sampled(a, b):
    one, two = (np.load(Path(folder) / "samples.npz") for folder in (a, b))
    return all(np.array_equal(one[key], two[key]) for key in ("arr_0", "arr_1")) and all(
        (Path(a) / file).read_bytes() == (Path(b) / file).read_bytes() for file in ("grid.png", "png/000001.png"))


def kill(job, equal, folder, n, rng):
    """Start `job` again and again, each time ended by a random signal at a random moment, until it comes to its end;
    and that again until n kills are done. Every result must be `equal` to an undisturbed run's. A list of failures."""
    seconds = whole(f"{job} --out {folder}/whole", folder / "whole.log")
    failures, killed, chain = [], 0, 0
    while killed < n:
        out, log, chain = folder / f"chain{chain}", folder / f"chain{chain}.log", chain + 1
        done = False
        while not done:
            pid = start(f"{job} --out {out}", log)
            if killed < n:
                number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                time.sleep(rng.uniform(0, seconds / 2))
                done = os.waitpid(pid, os.WNOHANG)[0] == pid
                if not done:
                    os.kill(pid, number)
                    killed += 1
                    code = end(pid)
                    if code not in (0, -number, 130):
                        failures.append(f"{number.name}: exit code {code}")
                        return failures + [log.read_text()[-2000:]]
                    # sample.py's last deeds: once they are done it is refused
                    done = (out / "samples.npz").exists() and not list(out.glob("part-*"))
            else:
                if code := end(pid):
                    return failures + [f"going on: exit code {code}\n{log.read_text()[-2000:]}"]
                done = True
            metrics(out)  # valid at every moment
        if "Traceback" in log.read_text():
            failures.append(f"a traceback: {log.read_text()[-2000:]}")
        if not equal(folder / "whole", out):
            failures.append(f"{out} is not what the undisturbed run gave")
    return failures


def kills(n, folder, rng):
    """Rows of the table for all stages."""
    for path in ("vgg", "stages"):
        (folder / path).mkdir(parents=True)
    vgg, tokenizer = folder / "vgg.pt", folder / "tokenizer.pt"
    whole(lambda: (save_vgg(vgg), save_prior(folder / "prior.pt", save_tokenizer(tokenizer))), folder / "log")
    prior = f"{PRIOR} --tokenizer {tokenizer}"
    stages = [
        ("train_vgg.py", f"train_vgg.py {TRAIN} --widths 8 8 8 8 8 --workers 0", trained),
        ("train_tokenizer.py", f"{TOKENIZER} --vgg {vgg} --workers 0", trained),
        ("train_tokenizer.py, 2 data workers", f"{TOKENIZER} --vgg {vgg} --workers 2", trained),
        ("train_prior.py", f"train_prior.py {prior} --codes {folder}/codes --kind nar", trained),
        ("encoding the data set", f"train_prior.py {prior} --iters 1 --views 4", cached),
        ("sample.py", f"sample.py --prior {folder}/prior.pt --tokenizer {tokenizer} --n 24 --batch_size 2 --png "
                      f"--device cpu", sampled)]
    for i, (name, job, equal) in enumerate(stages):
        (folder / f"stages/{i}").mkdir()
        yield f"kill: {name}", n, kill(job, equal, folder / f"stages/{i}", n, rng)


def save_vgg(path):
    torch.manual_seed(1)
    net = losses.SmallVGG([8] * 5, 10)
    net(torch.randn(8, 3, 16, 16), losses.LAYERS)
    torch.save({"kind": "vgg", "model": net.state_dict(), "config": net.config,
                "labels": {"classes": [str(i) for i in range(10)], "fine": 1}}, path)


# ------------------------------------------------------------------------------------------------ damaged files

def damage(raw, rng):
    """What can happen to the bytes of a file."""
    raw, at, size = bytearray(raw), rng.randrange(len(raw)), rng.randrange(1, 200)
    kind = rng.choice(["cut", "bit", "bit", "bits", "zeros", "noise", "longer", "empty", "moved", "text"])
    if kind == "cut":
        raw = raw[:at]
    elif kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else 20):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind in ("zeros", "noise"):
        raw[at:at + size] = bytes(size) if kind == "zeros" else rng.randbytes(size)
    elif kind == "longer":
        raw += rng.randbytes(size)
    elif kind == "moved":  # a block is lost in the middle
        del raw[at:at + size]
    else:
        raw = bytearray(b"<html>not found</html>" if kind == "text" else b"")
    return kind, bytes(raw)


class Code:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def outcome(load, path, good, changes_show=True):
    """What came of reading a bad file: "" if it was refused in one sentence, or read as if whole; else the fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of pictures whose headers do not fit
            found = load(path)
    except (BadInput, data.Unreadable) as error:
        return "" if "\n" not in str(error) else f"more than one line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "" if not changes_show or same(found, good) else "changed, and not refused"


def targets(folder):
    """name -> (a good file, how it is read, whether a change must show)."""
    net = losses.SmallVGG([8] * 5, 10)
    save_vgg(folder / "vgg.pt")
    save_prior(folder / "prior.pt", save_tokenizer(folder / "tokenizer.pt"))

    network = argparse.Namespace(feature_dim=8, resize="none", weights="0")  # as far as load_statistics looks
    np.savez(folder / "statistics.npz", mu=np.zeros(8), sigma=np.eye(8), n=100, description="x", resize="none",
             weights="0")
    np.savez(folder / "samples.npz", arr_0=np.random.default_rng(0).integers(0, 255, (9, 8, 8, 3), dtype=np.uint8),
             arr_1=np.arange(9))

    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 3, 16, 16), ("logit",))["logit"].sum().backward()
    optimizer.step()
    args = argparse.Namespace(out=str(folder / "run"), resume=True, tensorboard=False, lr=1.0)
    run = runtime.Run(args, "vgg")
    run.resume()
    run.save(2, model=net.state_dict(), optimizer=optimizer.state_dict(), config={}, labels={})
    for step in (1, 2):
        run.log(step, "train", loss=0.5)

    def resume(path):
        shutil.copy(path, run.ckpt)
        state = run.resume(model=net, optimizer=optimizer)
        return {name: state[name] for name in ("model", "optimizer", "step", "kind", "args")}

    def log(path):  # the lines that are whole are kept
        shutil.copy(folder / "run.pt", run.ckpt)
        shutil.copy(path, run.metrics)
        run.resume()
        return metrics(run.out)

    def statistics(path):
        found = fid.load_statistics(str(path), network)
        return [found["mu"], found["sigma"], found["n"]]

    def samples(path):
        source = fid.Samples(str(path))
        return [np.asarray(source.load(i)).tolist() for i in range(len(source))], [source.label(i) for i in range(9)]

    shutil.copy(run.ckpt, folder / "run.pt")
    shutil.copy(run.metrics, folder / "metrics.jsonl")
    yield "vgg.pt", lambda path: train_tokenizer.load_vgg(str(path)).state_dict(), True
    yield "tokenizer.pt", lambda path: train_tokenizer.load_tokenizer(path).state_dict(), True
    yield "prior.pt", lambda path: sample.load_pair(path, folder / "tokenizer.pt", "cpu")[0].state_dict(), True
    yield "run.pt", resume, True
    yield "metrics.jsonl", log, False
    yield "statistics.npz", statistics, True
    yield "samples.npz", samples, True

    picture = draw(3, 3, 40)
    for extension, options in (("jpg", {}), ("png", {}), ("gif", {}), ("webp", {}), ("bmp", {}), ("ppm", {}),
                               ("tiff", {"compression": "tiff_lzw"})):
        picture.save(folder / f"image.{extension}", **options)
        yield f"image.{extension}", lambda path: data.decode(str(path), str(path)), False


def crafted(folder, readers):
    """Files that are whole, and wrong: name, how they are read, path."""
    marker, number = folder / "marker", 0

    def case(name, content):
        nonlocal number
        number += 1
        path = folder / f"crafted{number}"
        torch.save(content, path)
        return f"{name} {number}", readers[name], path

    for name in ("vgg.pt", "tokenizer.pt", "prior.pt", "run.pt"):
        good = torch.load(folder / name, weights_only=True)
        for key, tensor in list(good["model"].items())[:3]:
            for value in (None, "x", torch.zeros(()), tensor[:1], tensor[None]):
                yield case(name, good | {"model": dict(good["model"]) | {key: value}})
            yield case(name, good | {"model": {k: v for k, v in good["model"].items() if k != key}})
        yield case(name, good | {"model": dict(good["model"]) | {"stray": torch.ones(1)}})
        yield case(name, [1, 2])
        yield case(name, good | {"args": Code(marker)})
        yield case(name, Code(marker))
        for other in ("statistics.npz", "samples.npz", "image.png", "metrics.jsonl", "vgg.pt", "prior.pt",
                      "tokenizer.pt"):
            if other != name and not (name == "run.pt" and other == "vgg.pt"):
                yield f"{name} is {other}", readers[name], folder / other
    for name in ("vgg.pt", "statistics.npz", "samples.npz"):
        (folder / "code.pkl").write_bytes(pickle.dumps(Code(marker)))
        yield f"a pickle as {name}", readers[name], folder / "code.pkl"
    evil = np.array([Code(marker)] * 8, dtype=object)
    for i, arrays in enumerate((dict(arr_0=evil), dict(arr_0=np.zeros((8, 8, 8, 3), np.uint8), arr_1=evil),
                                dict(mu=evil, sigma=np.eye(8)),
                                dict(mu=np.zeros(8), sigma=np.eye(8), description=evil))):
        np.savez(folder / f"evil{i}.npz", **arrays)
        yield f"npz with code {i}", readers["samples.npz" if i < 2 else "statistics.npz"], folder / f"evil{i}.npz"
    eye = np.eye(8)
    for i, arrays in enumerate((dict(mu=np.zeros(8)), dict(mu=np.zeros((2, 4)), sigma=eye), dict(mu="x", sigma=eye),
                                dict(mu=np.zeros(8), sigma=np.full((8, 8), np.inf)),
                                dict(mu=np.zeros(8), sigma=np.triu(eye + 1)),
                                dict(mu=np.zeros(8), sigma=-eye), dict(mu=np.zeros(8), sigma=eye * 1j),
                                dict(mu=np.zeros(8), sigma=eye, n="x", resize="none", weights="0"),
                                dict(mu=np.zeros(8), sigma=eye, weights=np.arange(3)))):
        np.savez(folder / f"statistics{i}.npz", **arrays)
        yield f"statistics {i}", readers["statistics.npz"], folder / f"statistics{i}.npz"
    u8 = np.uint8
    for i, arrays in enumerate((dict(arr_0=np.zeros((0, 8, 8, 3), u8)), dict(arr_0=np.zeros((4, 0, 8, 3), u8)),
                                dict(arr_0=np.zeros((4, 8, 8, 3), u8), arr_1=np.array(list("abcd"))),
                                dict(arr_0=np.zeros((4, 8, 8, 3), u8), arr_1=np.full(4, np.nan)),
                                dict(arr_0=np.zeros((4, 8, 8), u8)), dict(arr_0=np.zeros((), u8)))):
        np.savez(folder / f"samples{i}.npz", **arrays)
        if i:  # no sample at all is for fid.Images to refuse
            yield f"samples {i}", lambda path: fid.Samples(str(path)), folder / f"samples{i}.npz"


def fuzz(n, folder, rng):
    """Rows of the table: files damaged n times each, and files made up."""
    folder.mkdir()
    files = list(targets(folder))
    for name, load, shows in files:
        raw, failures = (folder / name).read_bytes(), []
        good = load(folder / name)
        for _ in range(n):
            kind, content = damage(raw, rng)
            (folder / f"bad-{name}").write_bytes(content)
            if fault := outcome(load, folder / f"bad-{name}", good, shows):
                (folder / f"fault{len(failures)}-{name}").write_bytes(content)
                failures.append(f"{kind}: {fault}")
        yield f"damage: {name}", n, failures
    faults, count = [], 0
    for name, load, path in crafted(folder, {name: load for name, load, _ in files}):
        count += 1
        if fault := outcome(load, path, None, changes_show=False):
            faults.append(f"{name}: {fault}")
    if (folder / "marker").exists():
        faults.append("code in a file was run")
    yield "files made up", count, faults


# ------------------------------------------------------------------------------------------------------ the soak

def soak(seconds, folder):
    """Small training steps, encoding, sampling in one process, again and again; memory and open files must not grow,
    and metrics.jsonl must be whole whenever it is read."""
    folder.mkdir()
    save_vgg(folder / "vgg.pt")
    save_tokenizer(folder / "tokenizer.pt")
    fault, reads, over = [], [0], threading.Event()

    def watch():
        while not over.wait(0.01):
            for path in folder.glob("*/metrics.jsonl"):
                try:
                    metrics(path.parent)
                    reads[0] += 1
                except FileNotFoundError:
                    pass  # removed between two rounds
                except ValueError as error:
                    fault.append(f"{path}: {error}")

    watcher = threading.Thread(target=watch)
    watcher.start()
    train = f"--vgg {folder}/vgg.pt --out {folder}/tokenizer"
    prior = f"train_prior.py {PRIOR} --tokenizer {folder}/tokenizer.pt --out {folder}/prior"
    rounds, began = [], time.monotonic()
    while time.monotonic() - began < seconds:
        workers = 2 if len(rounds) % 10 == 0 else 0
        for job in (f"{TOKENIZER} {train} --workers {workers}", prior,
                    f"sample.py --prior {folder}/prior/ckpt.pt --tokenizer {folder}/tokenizer.pt --n 4 --device cpu "
                    f"--out {folder}/samples"):
            sys.argv = job.split()
            with open(os.devnull, "w") as null:
                sys.stdout, out = null, sys.stdout
                try:
                    importlib.import_module(sys.argv[0][:-3]).main()
                finally:
                    sys.stdout = out
                    for number in (signal.SIGINT, signal.SIGTERM):  # they hold the Run
                        signal.signal(number, signal.SIG_DFL)
        for name in ("tokenizer", "prior", "samples"):
            shutil.rmtree(folder / name)
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rounds.append((pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))))
        if len(rounds) % 20 == 0:
            print(f"round {len(rounds)}, {time.monotonic() - began:.0f} s: {rounds[-1][0]:.0f} MB, {rounds[-1][1]} "
                  f"open files, {reads[0]} reads of metrics.jsonl", flush=True)
    over.set()
    watcher.join()
    half = len(rounds) // 2
    early, late = (np.array(part) for part in (rounds[half // 2:half], rounds[-max(1, half // 2):]))
    print(f"{len(rounds)} rounds; memory {early[:, 0].mean():.0f} MB in the second quarter, {late[:, 0].mean():.0f} MB "
          f"in the second half; open files {early[:, 1].max():.0f} and {late[:, 1].max():.0f}", flush=True)
    if late[:, 0].mean() > 1.03 * early[:, 0].mean():
        fault.append("memory grows")
    if late[:, 1].max() > early[:, 1].max():
        fault.append("open files grow in number")
    yield f"soak: rounds in {seconds} s", len(rounds), fault


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="kills of each stage")
    parser.add_argument("--fuzz", type=int, default=0, help="damaged copies of each kind of file")
    parser.add_argument("--soak", type=int, default=0, help="seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    args = parser.parse_args()
    Shapes.SIZES = {"train": 40, "val": 8}
    chunks = runtime.chunks  # many, so that kills fall between and into them
    runtime.chunks = lambda folder, rows, size: chunks(folder, rows, min(size, 4))
    rng, folder, failed = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="trials-")), 0
    rows = [*([kills(args.kills, folder / "kills", rng)] if args.kills else []),
            *([fuzz(args.fuzz, folder / "fuzz", rng)] if args.fuzz else []),
            *([soak(args.soak, folder / "soak")] if args.soak else [])]
    print(f"{'trial':45}{'times':>7}{'failed':>8}", flush=True)
    for part in rows:
        for name, times, failures in part:
            failed += len(failures)
            print(f"{name:45}{times:>7}{len(failures):>8}", flush=True)
            for text in failures[:5]:
                print(f"    {text}", flush=True)
    if failed:
        sys.exit(f"what failed is in {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
