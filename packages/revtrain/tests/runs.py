"""What two runs must share to count as the same, bit for bit."""

import json

import torch
from accelerate.utils.other import load

# How long things took and how much memory the process had is another matter.
_TIMES = ("seconds", "step_seconds", "images_per_second", "peak_memory_bytes")


def metrics(folder):
    """The records of a run, without times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in _TIMES} for record in records]


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("step-*"))


def state(checkpoint):
    """All that a checkpoint holds, without times: bytes of weights, values of everything else."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        if path.name == "model.safetensors":
            files[path.name] = path.read_bytes()
        elif path.suffix in (".bin", ".pkl", ".pt"):
            files[path.name] = load(path)
    progress = json.loads((checkpoint / "progress.json").read_text())
    records = [{k: v for k, v in r.items() if k not in _TIMES} for r in progress["records"]]
    files["progress"] = {**progress, "records": records, "seconds": None}
    return files


def same(a, b):
    """Whether two values are equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "tobytes"):
        return a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def assert_same_run(one, other):
    """Weights, metrics, optimizer, schedule, random states: the last checkpoints are compared."""
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    assert metrics(one) == metrics(other)
    a, b = state(checkpoints(one)[-1]), state(checkpoints(other)[-1])
    assert a.keys() == b.keys()
    for name in a:
        assert same(a[name], b[name]), name
