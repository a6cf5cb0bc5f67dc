"""BLOOM's own attention against ours: time and memory of a training step, padded and packed.

    python benchmarks/bloom_attention.py [--layers 2] [--hidden 512] [--heads 8] [--pairs 5]

Two models of the same random weights in one process take turns (A B, B A, A B, …); the table shows the median time of
each and the median of the pairs' ratios, which a busy machine disturbs less than the times. On the CPU time is the
processor's, and memory what the step keeps for its backward pass beyond the weights, counted once per storage; on a GPU
they are the clock's and the step's peak. The head is left out: a step is the layers' forward and backward pass.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch  # noqa: TID253
from transformers import BloomConfig, BloomForCausalLM  # noqa: TID253

from stages.model import bloom

Batch = dict[str, torch.Tensor]


def lengths_of(count: int, longest: int) -> list[int]:
    """Lengths of `count` conversations: many short ones, few long ones, none above `longest` tokens."""
    draw = random.Random(0)
    return [min(longest, int(draw.lognormvariate(5, 0.7))) for _ in range(count)]


def padded(lengths: list[int], device: str) -> list[Batch]:
    """Batches of 4 rows, each padded to its longest."""
    rows = [lengths[start : start + 4] for start in range(0, len(lengths), 4)]
    batches = []
    for part in rows:
        mask = (torch.arange(max(part)) < torch.tensor(part)[:, None]).long()
        batches.append({"input_ids": 3 * mask, "attention_mask": mask})
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def packed(lengths: list[int], room: int, device: str) -> list[Batch]:
    """The same rows end to end, at most `room` tokens a batch."""
    batches: list[list[int]] = [[]]
    for length in lengths:
        if sum(batches[-1]) + length > room:
            batches.append([])
        batches[-1].append(length)
    positions = [torch.cat([torch.arange(length) for length in part])[None].to(device) for part in batches]
    return [{"input_ids": torch.full_like(part, 3), "position_ids": part} for part in positions]


def step(model: BloomForCausalLM, batches: list[Batch], dtype: torch.dtype, device: str) -> None:
    for batch in batches:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            hidden = model.transformer(**batch, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
    if device == "cuda":
        torch.cuda.synchronize()


def memory(model: BloomForCausalLM, batches: list[Batch], dtype: torch.dtype, device: str) -> float:
    """MiB of the largest batch, see the top."""
    batch = max(batches, key=lambda batch: batch["input_ids"].numel())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, [batch], dtype, device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model, [batch], dtype, device)
    return sum(kept.values()) / 2**20


def paired(first: Callable[[], None], second: Callable[[], None], pairs: int) -> tuple[float, float, float]:
    """Median seconds of each and the median of first / second; one untimed run of each before."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    first(), second()
    times: dict[Any, list[float]] = {first: [], second: []}
    for number in range(pairs):
        for run in (first, second) if number % 2 == 0 else (second, first):
            begin = clock()
            run()
            times[run].append(clock() - begin)
    ratios = [a / b for a, b in zip(times[first], times[second], strict=True)]
    return statistics.median(times[first]), statistics.median(times[second]), statistics.median(ratios)


@torch.no_grad()
def precision() -> None:
    """Largest and mean differences of logits, on the CPU; the weights are drawn wide, so that attention matters."""
    torch.manual_seed(0)
    eager = BloomForCausalLM(BloomConfig(hidden_size=256, n_layer=2, n_head=8, vocab_size=500)).eval()
    for name, weight in eager.transformer.h.named_parameters():
        if name.endswith(("query_key_value.weight", "dense.weight", "h.weight")):
            weight.mul_(4)
    lengths = [1, 700, 1, 300, 2, 150, 300, 546]
    ids = torch.randint(500, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    rounded = copy.deepcopy(eager).bfloat16()
    exact = copy.deepcopy(rounded).float()  # what bfloat16 weights would give without more rounding
    ours, ours_rounded = copy.deepcopy(eager), copy.deepcopy(rounded)
    bloom.install(ours)
    bloom.install(ours_rounded)
    packed = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split(lengths, 1)], 1)
    apart, mixed = ((logits - alone).abs().max() for logits in (packed, eager(**whole).logits))
    print(f"\nlogits up to {float(alone.abs().max()):.1f}; {len(lengths)} documents of up to {max(lengths)} tokens")
    print(f"float32, packed against alone, largest: {float(apart):.1e}; not kept apart: {float(mixed):.1f}")
    unpacked = (ours(**whole).logits - eager(**whole).logits).abs().max()
    print(f"float32, one document of {sum(lengths)}, ours against transformers' own, largest: {float(unpacked):.1e}")
    for name, model in (("transformers' own", rounded), ("ours", ours_rounded)):
        error = (model(**whole).logits - exact(**whole).logits).abs().mean()
        print(f"bfloat16 against float32, one document of {sum(lengths)}, {name}, mean: {float(error):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 2), ("hidden", 512), ("heads", 8), ("pairs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = BloomConfig(hidden_size=asked.hidden, n_layer=asked.layers, n_head=asked.heads, vocab_size=1000)
    eager = BloomForCausalLM(config).to(device).train()
    ours = copy.deepcopy(eager)
    bloom.install(ours)

    mixed = lengths_of(16, 1024)
    cases = [(f"one row of {length}", *[padded([length], device)] * 2) for length in (512, 1024, 2048)]
    cases += [
        ("16 conversations, padded", *[padded(mixed, device)] * 2),
        ("16 conversations, padded → packed", padded(mixed, device), packed(mixed, 2048, device)),
    ]
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.pairs} pairs;", end=" ")
    print(f"{asked.layers} layers of {asked.hidden}, {asked.heads} heads;", end=" ")
    print(f"conversations of {min(mixed)} to {max(mixed)} tokens, {sum(mixed)} in all")
    print("\n| | dtype | eager ms | ours ms | eager / ours | eager MiB | ours MiB |")
    print("|---|---|---|---|---|---|---|")
    for name, theirs, own in cases:
        for dtype in (torch.float32, torch.bfloat16):
            here = (dtype, device)
            first, second, ratio = paired(
                lambda batches=theirs, here=here: step(eager, batches, *here),
                lambda batches=own, here=here: step(ours, batches, *here),
                asked.pairs,
            )
            kept = memory(eager, theirs, *here), memory(ours, own, *here)
            shown = f"{1000 * first:.0f} | {1000 * second:.0f} | {ratio:.2f} | {kept[0]:.0f} | {kept[1]:.0f}"
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {shown} |", flush=True)
    precision()


if __name__ == "__main__":
    main()
