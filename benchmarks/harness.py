"""What every benchmark shares: timing, peak memory, the facts of the environment, and rows of results.

A row is a flat dict, stored as one line of JSON.  Times are in milliseconds, memory in MiB (2^20 bytes).
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import dydila_kernels
from dydila_kernels import tuning

Row = dict[str, Any]
Call = Callable[[], object]
Clock = Callable[[], float]  # makes a call and says how many seconds it took
Name = TypeVar("Name")
Result = TypeVar("Result")

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
MIB = 2**20
LARGEST_RATIO = 2.0  # of our error to that of plain PyTorch in the same dtype


class CheckFailed(RuntimeError):
    """The results are wrong, so their speed is not worth measuring."""


def require_correct(error_ratio: float) -> None:
    """Raise unless our error is small enough.  To be called before any timing."""
    if not error_ratio <= LARGEST_RATIO:  # written so that NaN fails
        raise CheckFailed(f"our error is {error_ratio:.3g} times that of plain PyTorch, over {LARGEST_RATIO:g}")


@dataclass(frozen=True)
class Options:
    """What every benchmark can be told."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # Where to run: cpu or cuda.
    threads: int = 2  # CPU threads.
    smoke: bool = False  # Try everything in seconds, on tiny sizes; rows are stored only where --out says.
    out: Path | None = None  # Folder for the rows; by default results/DEVICE for comparisons, and none for others.

    @property
    def on_gpu(self) -> bool:
        return is_gpu(self.device)


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def told(command: Callable[[], Result], *errors: type[Exception]) -> Result:
    """What the command returns; an error that is to be expected ends it with a message, and no traceback."""
    try:
        return command()
    except (ImportError, OSError, ValueError, *errors) as error:  # type: ignore[misc]
        raise SystemExit(f"benchmarks.{Path(sys.argv[0]).stem}: {error}") from None


def clock(call: Call, device: str = "cpu") -> Clock:
    """Of a call as a whole: by the CPU's clock, or by events on an idle GPU."""
    return partial(tuning.seconds_of, call, torch.device(device))


def interleave(clocks: Mapping[Name, Clock], repeats: int, budget_seconds: float) -> dict[Name, list[float]]:
    """Time calls in turn, A B A B ..., so that a drift of the machine meets all of them; seconds per call.

    The first call of each warms up and is dropped.  A call that has used up its budget takes no further turn; if that
    happens in the first round already, its first call is a long one, in which warming up is no part to speak of, and it
    is kept as the only sample.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in clocks}
    for _ in range(repeats + 1):
        for name, clock in clocks.items():
            if sum(seconds[name]) <= budget_seconds:
                seconds[name].append(clock())
    return {name: samples[1:] or samples for name, samples in seconds.items()}


def captured(prepare: Callable[[], Call]) -> Call:
    """The call that is prepared, as a CUDA graph: replaying it takes the time of the device alone.

    It is prepared here because autograd runs a backward pass on the stream of its forward pass.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = prepare()
        for _ in range(2):  # allocations and compilations of a first call cannot be captured
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay(_inputs: object = call) -> None:  # the graph knows their addresses only, so they must live as long
        graph.replay()

    return replay


def summarize(seconds: Sequence[float]) -> Row:
    """Median and 10 % and 90 % quantiles in milliseconds, and of how many calls."""
    samples = 1e3 * torch.tensor(seconds, dtype=torch.float64)
    q10, median, q90 = samples.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"median_ms": median, "q10_ms": q10, "q90_ms": q90, "repeats": len(seconds)}


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a process of its own; both must pickle.

    The process is forked from a server that has imported what this process has of the project and computed nothing, so
    it starts in milliseconds and with clean memory.  Threads and seeds are the function's to set.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith(("benchmarks.", "examples."))])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def peak_growth_mib(call: Call, device: str = "cpu") -> float | None:
    """How far memory rises above its present level during the call; None where it cannot be told.

    On the CPU this is resident memory of the process.  Measure it :func:`in_fresh_process`: memory that an earlier call
    has returned to the allocator, but not to the system, would hide the growth.
    """
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - held) / MIB
    if platform.system() != "Linux":
        return None
    # Not ru_maxrss: it starts at the parent's peak and cannot be reset.
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present level
    before = _resident_mib("VmRSS")
    call()
    return max(_resident_mib("VmHWM") - before, 0.0)  # the system counts by the page only now and then


def _resident_mib(field: str) -> float:
    (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) / 1024


def stored(
    suite: str, rows: Iterable[Row], device: str, dtype: torch.dtype, folder: Path | None, *, total: int | None = None
) -> list[Row]:
    """The rows, to which the facts of the run are added; each goes to FOLDER/SUITE.jsonl as it comes."""
    kind = {"device_type": torch.device(device).type, "dtype": str(dtype).removeprefix("torch.")}
    facts = {"suite": suite, **environment(device), **kind}
    found: list[Row] = []
    for row in tqdm(rows, suite, total, unit="row"):
        row |= facts
        found.append(row)
        if folder is not None:
            write_rows(folder / f"{suite}.jsonl", found)
    return found


def environment(device: str) -> Row:
    """Where and when a row was measured: commit, versions, device, threads, date, and how busy the machine has been."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw", "--format=csv,noheader", "-i"]
    return {
        "commit": _commit(),
        "dydila_kernels": dydila_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": next((found.version for found in metadata.distributions(name="triton")), None),
        "device": device_name(device),
        "clocks": _said_by(*query, str(torch.device(device).index or 0)) if is_gpu(device) else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # processes running, last minute
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The short hash of the commit, with "+" behind it where code differs from it; "unknown" outside a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    commit = _said_by(*git, "rev-parse", "--short", "HEAD")
    changes = _said_by(*git, "status", "--porcelain", "--", ":!benchmarks/results")
    return "unknown" if commit is None or changes is None else commit + ("+" if changes else "")


def _said_by(*command: str) -> str | None:
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str) -> str:
    if is_gpu(device):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def folder_of(device_type: str, name: str, results: Path = RESULTS) -> Path:
    """Where the rows of a device are kept."""
    return results / (name.replace(" ", "-").lower() if device_type == "cuda" else "cpu")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Store the rows of a run, in place of those of the run before; a kill while writing leaves those."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]
