"""What every script needs and no model should know: processes, flags, run folders, checkpoints, signals.

Parallelism comes from outside the models. A script calls `device = runtime.setup(args.device)` once; under
torchrun that starts the process group, under plain python it does nothing of the kind, and from then on the
same lines work for one process and for many. Gradients are averaged by hand after the backward pass
(`average_gradients`): two networks trained in turn, gradient accumulation and the double backward of R1 need no
special case then.
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
import weakref
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class BadInput(ValueError):
    """Something a person can mend. Its text is one sentence: what, where, what to do."""


# What the machine may do to a program that is right. All other RuntimeErrors are our own and show their traceback.
MACHINE = ("out of memory", "can't allocate memory", "DataLoader worker (pid")
LOST = ("Connection closed by peer", "Connection reset by peer")  # gloo, when another process has ended


def run(main):
    """Call `main()`. A BadInput, and a fault of the machine (disk, memory, a data worker killed), becomes one line on
    stderr and exit code 2, never a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # the name of a file may be no text: it must not end a run when printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except BadInput as error:
        _leave(2, str(error))
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except (OSError, MemoryError, RuntimeError) as error:
        if world() > 1 and any(words in str(error) for words in LOST):
            _leave(2, "another process of this run has ended: look for its message")
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in MACHINE):
            raise
        advice = ("mend the disk or the permissions" if isinstance(error, OSError) else
                  "give it more memory, a smaller batch (--accum), or fewer --workers")
        text = [type(error).__name__, *str(error).strip().splitlines()][-1]  # a worker's ends with what it was
        _leave(2, f"{text}: {advice}, and run the same command again (training: with --resume)")
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave(code, sentence):
    print(f"{Path(sys.argv[0]).name}: {' '.join(sentence.split())}", file=sys.stderr, flush=True)
    # Under torchrun the other processes may sit in a collective; do not wait for them, torchrun ends them.
    os._exit(code) if world() > 1 else sys.exit(code)


@contextlib.contextmanager
def refusing(path=None):
    """The models know nothing of BadInput: their ValueErrors become one. With the `path` of a file, whatever goes
    wrong with what it holds becomes one: a file that is damaged or made up can raise nearly anything."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if path:
            text = str(error).strip().splitlines()
            text = text[-1].strip() if text else ""
            raise BadInput(f"{path} does not fit ({type(error).__name__}: {text}): give a file that this code wrote, "
                           f"and the flags that go with it") from error
        if not isinstance(error, ValueError):
            raise
        raise BadInput(str(error)) from None


# ---------------------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """argparse without abbreviations (a misspelt flag must not be swallowed) and with one-sentence errors."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, words=None):
        """The flags. `self.given` are the names of those on the command line: what a script may not then overrule."""
        words = sys.argv[1:] if words is None else words
        for before, word in zip([self.prog, *words], words):
            if not word.strip() or word.startswith("--") and word.endswith("="):  # --init "$INIT" with INIT unset
                raise BadInput(f"the value after {before} is empty: give one, or leave the flag out")
        names = {option: action.dest for action in self._actions for option in action.option_strings}
        self.given = {names[word.split("=")[0]] for word in words if word.split("=")[0] in names}
        return super().parse_args(words)

    def error(self, message):
        raise BadInput(f"{message} (--help lists the flags)")


def bounded(kind, low, high=float("inf"), *, above=False):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] with `above`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not (low < value if above else low <= value) or not value <= high or value == float("inf"):
            bounds = f"above {low}" if above else f"at least {low}"
            raise argparse.ArgumentTypeError(f"{text} is outside its range ({bounds}"
                                             + (")" if high == float("inf") else f", at most {high})"))
        return value
    return parse


count, positive, side = bounded(int, 0, 2**31 - 1), bounded(int, 1, 2**31 - 1), bounded(int, 1, 8192)
fraction, weight, rate = bounded(float, 0, 1), bounded(float, 0), bounded(float, 0, above=True)
workers = bounded(int, 0, 256)


def add_training_flags(parser, *, out, iters, batch_size, lr, data_default="shapes"):
    """The flags that all scripts that train share (None: the script fills in its own default)."""
    add = parser.add_argument
    add("--data", default=data_default,
        help="shapes, a folder of class folders, a flat folder, FILE.tar, a folder of tar files, or lsun:PATH")
    add("--val", default="", help="the same for validation; shapes has held-out pictures of its own")
    add("--out", default=out, help="run folder; one that holds a checkpoint is refused unless --resume")
    add("--resume", action="store_true", help="go on from the checkpoint in --out if there is one, else start")
    add("--iters", type=positive, default=iters, help="training steps")
    add("--batch_size", type=positive, default=batch_size, help="global batch, over all processes and micro-batches")
    add("--accum", type=positive, default=1, help="micro-batches per step")
    add("--lr", type=rate, default=lr, help="learning rate")
    add("--seed", type=count, default=0, help="everything random follows from it")
    add("--workers", type=workers, default=8, help="data loading processes per training process")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="torch.compile (default: on a GPU)")
    add("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="autocast; auto: bf16 on a GPU")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: cuda, then mps, then cpu")
    add("--log_every", type=positive, default=50, help="steps between two progress lines")
    add("--eval_every", type=positive, default=5000, help="steps between two validations")
    add("--save_every", type=positive, default=5000, help="steps between two checkpoints")
    add("--tensorboard", action="store_true", help="write to TensorBoard as well (needs the package)")


def micro_batch(args):
    """Images per process and micro-batch, or BadInput if the global batch does not divide."""
    size, rest = divmod(args.batch_size, world() * args.accum)
    if rest:
        raise BadInput(f"--batch_size {args.batch_size} is not divisible by {world()} process(es) times "
                       f"--accum {args.accum}: choose a multiple of {world() * args.accum}")
    return size


# ------------------------------------------------------------------------------------------ processes

def setup(device="auto"):
    """Start the process group if torchrun did the launching, and choose this process's torch.device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available[device]:
        raise BadInput(f"--device {device}: this machine has none; use --device auto")
    if "RANK" in os.environ and not dist.is_initialized():
        # Two backends in one group: tensors on the GPU travel by nccl, flags and counts on the host by gloo.
        # Two hours: after long shared work (encoding a data set) the processes do not arrive together. A process that
        # dies is noticed at once, by torchrun and by its peers; the time-out is for one that falls silent.
        with refusing():  # RANK is set, but not by torchrun
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise BadInput(f"process {local} of this machine has no GPU of its own: "
                           f"use --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", local)
    return torch.device(device)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if world() > 1:
        dist.barrier()


def sum_over_processes(tensor):
    """Sum of `tensor` over all processes (in place; no gradient)."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return sum_over_processes(tensor.clone()) / world()

    @staticmethod
    def backward(ctx, grad):
        # Every process computes the same scalar from the mean, so every `grad` is the same, and the 1/world of the
        # mean is the one that `average_gradients` applies afterwards: nothing is left to do, or to communicate.
        return grad


def mean_over_processes(tensor):
    """Mean of `tensor` over all processes, with the gradient that is right under `average_gradients`."""
    return _Mean.apply(tensor) if world() > 1 else tensor


def gather_rows(tensor):
    """Concatenate the rows of all processes in order of rank (equal shapes; no gradient)."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def average_gradients(params):
    """Replace each .grad by its mean over all processes: one flat all-reduce, after the backward pass.

    DDP would overlap it with the backward pass, but has no place for R1's second derivative, and with a compiled
    model all gradients appear at once, at the end of its one graph. What it could hide is in `bench.py --scaling`."""
    grads = [p.grad for p in params if p.grad is not None]
    if world() > 1 and grads:
        flat = sum_over_processes(torch.cat([g.reshape(-1) for g in grads])) / world()
        for grad, mean in zip(grads, flat.split([g.numel() for g in grads])):
            grad.copy_(mean.view_as(grad))


# ------------------------------------------------------------------------------------ numbers and steps

def autocast(device, dtype):
    """bf16 autocast, or nothing for fp32. `dtype` is the flag: auto means bf16 on a GPU."""
    if dtype == "bf16" or (dtype == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def cosine(step, iters, start, end):
    """Cosine decay from `start` at step 0 to `end` at step `iters`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / iters))


def upload(tensor, device):
    """A host tensor on the device. To a GPU the copy is asynchronous from pinned memory only: without, the host would
    wait for all work that is queued, and the GPU then for the host."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(tensor):
    """Begin to copy a tensor to the host; gives a function that waits for it and returns the numpy array."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy
    host, arrived = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # torch makes `host` pinned
    arrived.record()

    def array():
        arrived.synchronize()
        return host.numpy()
    return array


def one_behind(items):
    """Yield each item when the next one is under way: the device works on that one while the host writes this one."""
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def seed_step(seed, step):
    """Make the torch random numbers of a step a function of (seed, step, process): a resumed run needs no saved
    generator, and two processes do not drop the same units."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> 1))


class Guard:
    """Takes optimizer steps, skips those with a non-finite gradient, and stops after twenty skipped in a row.

    The decision stays on the device: the fused Adam kernels leave weights and moments alone where `found_inf` is 1.
    Only `check`, called at log steps, waits for the device."""

    PATIENCE = 20

    def __init__(self, device):
        self.skipped, self.streak, self.worst = (torch.zeros((), device=device) for _ in range(3))

    def step(self, optimizer):
        """Average the gradients, step if they are all finite, clear them. Returns the gradient's norm."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        average_gradients(params)  # NaN anywhere is NaN everywhere: all processes decide alike
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        bad = (~norm.isfinite()).float()
        optimizer.found_inf = bad
        if bad.device.type != "mps" or not bad:  # the fused kernels of mps know no found_inf: ask here
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skipped += bad
        self.streak = (self.streak + bad) * bad
        self.worst = torch.maximum(self.worst, self.streak)
        return norm

    def check(self):
        """Number of skipped steps so far, and whether twenty came in a row (waits for the device)."""
        return int(self.skipped), int(self.worst) >= self.PATIENCE


# ------------------------------------------------------------------------------ checkpoints, run folders

FREE = {"lr", "lr_end", "out", "resume", "workers", "compile", "dtype", "device", "log_every", "eval_every",
        "save_every", "tensorboard", "recompute"}  # flags that may change from one start of a run to the next


def save_file(path, write):
    """Call write(file) on a temporary name, sync, rename: `path` is the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError, in riddles
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = error.strerror or error if isinstance(error, OSError) else "the disk is full, or failed"
        before = "the previous file is intact" if path.exists() else "nothing was there before"
        raise BadInput(f"could not write {path} ({why}): free the disk or mend the permissions, and run the "
                       f"same command again (training: with --resume); {before}") from error


def load_weights(path):
    """What torch.save has put in a file, on the CPU; BadInput if it holds more than tensors, numbers and strings, or is
    damaged: torch.load itself reads changed bits without a word, though each part of the file has a checksum."""
    try:
        if zipfile.is_zipfile(path):  # all but the oldest files
            with zipfile.ZipFile(path) as file:
                if any(part.compress_type for part in file.infolist()) or file.testzip():
                    raise zipfile.BadZipFile("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"{path} can't be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or not a checkpoint of this project "
                       f"({type(error).__name__}): give a file that a run of this project wrote") from error


# What a checkpoint of each kind has beside `kind`, as far as others than the run itself read it.
PARTS = {"tokenizer": {"args": dict, "config": dict, "model": dict},
         "prior": {"config": dict, "model": dict, "tokenizer": str, "grid": int, "classes": list, "step": int},
         "vgg": {"config": dict, "model": dict, "labels": dict}}


def load_checkpoint(path, kind):
    """Read a checkpoint of `kind` ("tokenizer", "prior", "vgg") on the CPU as a plain dict, or BadInput."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; expected a {kind} checkpoint (a run writes ckpt.pt)")
    state = load_weights(path)
    found = state.get("kind") if isinstance(state, dict) else None
    if found != kind:
        raise BadInput(f"{path} holds {f'a {found} checkpoint' if isinstance(found, str) else 'something else'}, "
                       f"but a {kind} checkpoint is needed here")
    for name, what in PARTS[kind].items():
        if not isinstance(state.get(name), what):
            raise BadInput(f"{path} is no whole {kind} checkpoint: its `{name}` is missing or no {what.__name__}")
    return state


def restore(path, make, weights):
    """make(), with the `weights` of the file `path` in it; BadInput if they do not fit or are not finite."""
    with refusing(path):
        with torch.device("meta"):  # first without memory: what an absurd shape asks for must not be there
            model = make()
        model.load_state_dict(dict(weights), assign=True)  # a copy: `assign` would stick to the dict's metadata
        if not all(t.isfinite().all() for t in weights.values()):
            raise ValueError("weights that are not finite")
        model = make()
        model.load_state_dict(weights)
    return model


def sha256(path):
    """The first 8 hexadecimal digits of a file's sha256: which file a number was measured with."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:8]


def lock(folder):
    """Make `folder` and lock it for as long as the returned file is open; BadInput if it can't be written, or if
    another process holds it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / "lock", "w")
    except OSError as error:
        raise BadInput(f"{folder} can't be written ({error.strerror}): choose another folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{folder} is in use by another run: wait for it, or choose another folder") from None
    except OSError:
        pass  # some network file systems have no locks
    # A forked data worker has the open file too, and outlives a killed run by seconds: --resume would be refused.
    held = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: held() and held().close())
    return file


class Rows:
    """Arrays in files, which all processes fill chunk by chunk. What a run has filled when it is killed stays, and the
    next one with the same `meta` goes on from there; another `meta` is refused.

    done.bin keeps the checksum of each finished chunk (0: not yet): a chunk that a crash has left in pieces, or that
    was damaged later, is filled again."""

    def __init__(self, folder, meta, chunk, **arrays):  # arrays: name -> (shape, dtype), a row per first index
        folder, self.rows, self.chunk = Path(folder), next(iter(arrays.values()))[0][0], chunk
        arrays["done"] = (-(-self.rows // chunk),), np.uint32
        self.lock = lock(folder) if is_main() else None
        if is_main():
            (self._check if (folder / "meta.json").exists() else self._make)(folder, meta, arrays)
        barrier()
        self.arrays = {name: np.memmap(folder / f"{name}.bin", dtype, "r+", shape=shape)
                       for name, (shape, dtype) in arrays.items()}
        self.done = self.arrays.pop("done")

    @staticmethod
    def _check(folder, meta, arrays):
        try:
            found = json.loads((folder / "meta.json").read_text())
            found = found if isinstance(found, dict) else {}
        except ValueError:
            found = {}
        for name, value in meta.items():
            if found.get(name) != value:
                raise BadInput(f"{folder} was begun with another `{name}` ({found.get(name)}, not {value}): "
                               f"remove the folder, or choose another")
        for name, (shape, dtype) in arrays.items():
            file, expected = folder / f"{name}.bin", math.prod(shape) * np.dtype(dtype).itemsize
            actual = file.stat().st_size if file.exists() else 0
            if actual != expected:
                raise BadInput(f"{file} has {actual} bytes, not {expected}: it was cut or overwritten; "
                               f"remove the folder {folder}")

    @staticmethod
    def _make(folder, meta, arrays):
        try:
            for name, (shape, dtype) in arrays.items():
                with open(folder / f"{name}.bin", "wb") as file:
                    size = math.prod(shape) * np.dtype(dtype).itemsize
                    # Zeros that are really there: a sparse file would meet a full disk later, as SIGBUS.
                    if hasattr(os, "posix_fallocate") and size:
                        os.posix_fallocate(file.fileno(), 0, size)
                    else:  # macOS
                        file.truncate(size)
        except OSError as error:
            raise BadInput(f"could not make room in {folder} ({error.strerror}): free the disk or mend the "
                           f"permissions, and run the same command again") from None
        save_file(folder / "meta.json", lambda file: file.write(json.dumps(meta).encode()))  # last: now they count

    def _checksum(self, chunk):
        value = 0
        for array in self.arrays.values():
            value = zlib.crc32(array[chunk.start:chunk.stop].tobytes(), value)
        return value or 1

    def todo(self):
        """This process's chunks that are to be filled, as ranges of rows. Chunks are shared out by number, not by what
        is left: another process may have finished one by the time this one looks."""
        chunks = [range(i, min(i + self.chunk, self.rows)) for i in range(0, self.rows, self.chunk)]
        return [chunk for i, chunk in enumerate(chunks) if i % world() == rank() and
                not (self.done[i] and self.done[i] == self._checksum(chunk))]

    def mark(self, chunk):
        """The rows of `chunk` are filled."""
        self.done[chunk.start // self.chunk] = self._checksum(chunk)

    def close(self):
        """Wait until all processes have filled their chunks, and leave the folder to others."""
        for array in (*self.arrays.values(), self.done):
            array.flush()
        barrier()
        self.lock = None


def check_out(args):
    """Refuse an --out that holds a run already, unless --resume: to be asked before anything slow."""
    if (Path(args.out) / "ckpt.pt").exists() and not args.resume:
        raise BadInput(f"{args.out} already holds a run: go on with --resume, or choose another --out")


class Run:
    """A run folder: ckpt.pt, metrics.jsonl, samples/. Refuses to overwrite, resumes, logs, notices signals.

    Use:  run = Run(args, "tokenizer"); state = run.resume(model=model, ...)  # None, or the checkpoint as a dict
          for step in range(start, iters): ...; run.log(...); run.stopping() -> save and leave
    """

    def __init__(self, args, kind):
        self.args, self.kind, self.out = args, kind, Path(args.out)
        self.ckpt, self.metrics = self.out / "ckpt.pt", self.out / "metrics.jsonl"
        self.lock = lock(self.out) if is_main() else None  # held as long as the run lives
        check_out(args)
        self.board = None
        if args.tensorboard and is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("--tensorboard needs the package: pip install tensorboard") from None
            self.board = SummaryWriter(self.out)
        self.signal, self.told = 0, 0.0
        self.clock = self.began = None

    def _on_signal(self, number, frame):
        # torchrun passes on a SIGTERM that a scheduler has sent to its workers as well, so a second one means nothing
        # new. A second Ctrl-C, two seconds later, does: end at once.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.told > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal, self.told = number, time.monotonic()

    def resume(self, **parts):
        """Fill models and optimizers (names as in `save`, None: not there) from the checkpoint, and return it; or None
        to start. From here on SIGTERM and SIGINT are heeded at the end of a step (`stopping`); before, they end the
        program as usual."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        state = load_checkpoint(self.ckpt, self.kind) if self.ckpt.exists() else None
        step = state.get("step") if state else -1
        if state and not (isinstance(step, int) and step >= 0):
            raise BadInput(f"{self.ckpt} does not say at which step it was written: it is no checkpoint of a run")
        if (gather_rows(torch.tensor([step])) != step).any():
            raise BadInput(f"the processes do not see the same checkpoint in {self.out}: --out must be on a disk that "
                           f"all machines share")
        self.logged = set()  # (step, split) of the lines of metrics.jsonl
        if not state:
            if is_main():
                self.metrics.unlink(missing_ok=True)  # of a run that died before its first checkpoint
            return None
        with refusing(self.ckpt):
            for name, value in vars(self.args).items():
                if name not in FREE and state["args"].get(name) != value:
                    raise BadInput(f"{self.ckpt} was made with --{name} {state['args'].get(name)}, not {value}: "
                                   f"give the same flags to go on, or another --out to start afresh")
            for name, part in parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
                if isinstance(part, torch.optim.Optimizer):  # which doesn't look at the shapes of its moments
                    for weight, moments in part.state.items():
                        if any(m.ndim and m.shape != weight.shape for m in moments.values()):
                            raise ValueError(f"the moments in `{name}` have other shapes than the weights")
        if self.metrics.exists():  # forget what was logged after the checkpoint, and what is no line
            lines = self.metrics.read_text(errors="replace").splitlines()
            kept = [(v, line) for line in lines if (v := _metrics(line)) and v["step"] <= step]
            self.logged = {(v["step"], v["split"]) for v, _ in kept}
            damaged = sum(_metrics(line) is None for line in lines)
            if is_main():
                save_file(self.metrics, lambda file: file.write("".join(f"{line}\n" for _, line in kept).encode()))
                if damaged:
                    print(f"{self.metrics}: {damaged} damaged line(s) left out", flush=True)
        return state

    def save(self, step, path=None, **state):
        """Write ckpt.pt (or `path`): plain tensors, numbers and strings, readable with weights_only=True."""
        if is_main():
            if not all(value.isfinite().all() for value in state["model"].values()):
                raise BadInput(f"the weights are not finite after step {step} and are not saved; {self.ckpt} holds an "
                               f"earlier step if it is there: go on from it with --resume and a lower --lr")
            state = {"kind": self.kind, "args": vars(self.args), "step": step, "torch": str(torch.__version__), **state}
            save_file(path or self.ckpt, lambda file: torch.save(state, file))
        barrier()

    def log(self, step, split, **values):
        """One line of metrics.jsonl (and TensorBoard). Tensors become numbers here: the only wait for the device."""
        values = {name: float(f"{float(value):.6g}") for name, value in values.items()}
        if is_main():
            # JSON knows no NaN: a non-finite value is written as null, so that every line parses anywhere.
            clean = {name: value if np.isfinite(value) else None for name, value in values.items()}
            line = (json.dumps({"step": step, "split": split, **clean}) + "\n").encode()
            try:
                with open(self.metrics, "ab", buffering=0) as file:  # one write: the line is there, or not
                    end = file.tell()
                    if file.write(line) < len(line):  # a disk that was full in the middle of it
                        file.truncate(end)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise BadInput(f"could not write {self.metrics} ({error.strerror}): mend it, then --resume") from None
            if self.board:
                for name, value in values.items():
                    self.board.add_scalar(f"{split}/{name}", value, step)
        return values

    def progress(self, step, **values):
        """Print one line: step, values, images/s since the last line, time left."""
        now = time.perf_counter()
        if self.clock is None:
            self.clock = self.began = (now, step)
        speed = ""
        if step > self.clock[1]:
            steps_per_s = (step - self.clock[1]) / (now - self.clock[0])
            left = (self.args.iters - step) * (now - self.began[0]) / (step - self.began[1])
            speed = f" | {steps_per_s * self.args.batch_size:.1f} images/s, {duration(left)} left"
        self.clock = (now, step)
        if is_main():
            text = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"step {step}/{self.args.iters} | {text}{speed}", flush=True)

    def stopping(self):
        """True on all processes once any of them was told to stop (SIGTERM, SIGINT). Costs no wait for the GPU."""
        if world() > 1:
            flag = torch.tensor(self.signal)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.signal = int(flag)
        return self.signal != 0

    def stopped(self, step):
        """Say that a signal ended the run after `step`, which is saved."""
        if is_main():
            print(f"stopped by a signal; {self.ckpt} holds step {step}, go on with --resume", flush=True)

    def broken(self):
        """The refusal to go on after a row of skipped steps."""
        return BadInput(f"{Guard.PATIENCE} steps in a row had non-finite gradients and were skipped; {self.ckpt} holds "
                        f"the last good state: go on with a lower --lr or --dtype fp32")


def _metrics(line):
    """A line of metrics.jsonl as a dict, or None if it is none."""
    try:
        values = json.loads(line)
        return values if isinstance(values["step"], int) and isinstance(values["split"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


class Progress:
    """Lines for long work that is no training: `for batch in ...: progress(len(batch))`."""

    def __init__(self, total, what, every_s=10):
        self.total, self.what, self.every, self.done = total, what, every_s, 0
        self.began = self.last = time.perf_counter()

    def __call__(self, n):
        self.done += n
        now = time.perf_counter()
        if is_main() and (now - self.last > self.every or (self.done >= self.total and now - self.began > self.every)):
            self.last, speed = now, self.done / (now - self.began)
            print(f"{self.what}: {self.done}/{self.total} | {speed:.1f}/s, "
                  f"{duration((self.total - self.done) / speed)} left", flush=True)


def duration(seconds):
    """7265.0 -> '2:01:05'."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
