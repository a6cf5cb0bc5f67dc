"""DeepSpeed and FSDP of other programs → `launch`, and rows of a step: theirs are counted on each device."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tools.convert_parts import Arguments, Book, Noted, Part
from stages import find

DEEPSPEED = "`launch: {strategy: zero2}` or `zero3`, by the stage of ZeRO in its file or in the file's name"
FSDP = "`launch: {strategy: fsdp2}`"
FSDP_DETAIL = "`launch: {strategy: fsdp2}` divides each layer and offloads with `offload: parameters`"
_IN_NAME = re.compile(r"(?:z|zero|stage)[_-]?([0-3])(?![0-9])")


def write_launch(take: Arguments, part: Part, book: Book) -> None:
    """Processes and strategy of a training stage, from the command and from its `deepspeed` and `fsdp`."""
    part.processes = take.job.processes or 1
    deepspeed, fsdp = take.take("deepspeed"), take.take("fsdp")
    config, version = take.take("fsdp_config"), take.take("fsdp_version")
    if deepspeed:
        _zero(deepspeed, part, book, take)
    elif fsdp or config:
        part.launch["strategy"] = "fsdp2"
        offloads = "offload" in str(fsdp) or (isinstance(config, Mapping) and config.get("offload_params"))
        part.launch |= {"offload": "parameters"} if offloads else {}
        if str(version or (config.get("fsdp_version") if isinstance(config, Mapping) else "")) != "2":
            book.note(
                "differs", take.place("fsdp"), "FSDP2 takes the place of FSDP; the result is the same but rounded"
            )
    parallel = find(part.kind).parallel
    strategies = parallel.strategies if parallel is not None else ()
    if part.launch and part.launch["strategy"] not in strategies:
        text = f"`{part.kind}` does not work with `{part.launch['strategy']}`; `zero2` takes its place"
        book.note("differs", take.place("deepspeed" if deepspeed else "fsdp"), text)
        part.launch = {"strategy": "zero2"}
    if part.launch and part.processes == 1:
        strategy = part.launch["strategy"]
        text = f"the command does not say how many GPUs train; write `launch: {{processes: N, strategy: {strategy}}}`"
        book.note("to do", take.place("deepspeed" if deepspeed else "fsdp"), text)
        part.launch = {}


def _zero(deepspeed: Any, part: Part, book: Book, take: Arguments) -> None:
    place = take.place("deepspeed")
    zero = _inner(_settings(deepspeed, take), "zero_optimization")
    named = _IN_NAME.search(Path(str(deepspeed)).name.lower()) if isinstance(deepspeed, str) else None
    stage = str(zero.get("stage", named[1] if named else ""))
    if stage not in ("1", "2", "3"):
        if stage != "0":
            text = f"`deepspeed: {deepspeed}` cannot be read here; write `launch: {{strategy: zero2}}` or `zero3`"
            book.note("to do", place, text)
        return
    if stage == "1":
        book.note("differs", place, "ZeRO-2 takes the place of ZeRO-1: it divides gradients too")
    part.launch["strategy"] = "zero3" if stage == "3" else "zero2"
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        device = _inner(zero, name).get("device")
        if device not in (None, "none") and (what == "optimizer" or stage == "3"):
            part.launch["offload"] = what


def _settings(deepspeed: Any, take: Arguments) -> Mapping[str, Any]:
    """The settings of DeepSpeed, of a mapping or of a file that is here; none where it cannot be read."""
    if isinstance(deepspeed, Mapping):
        return deepspeed
    for file in (Path(str(deepspeed)), take.job.folder / str(deepspeed)):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _inner(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping that a setting is; an empty one where it is null, or no mapping."""
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def launch_of(part: Part) -> dict[str, Any]:
    """`launch` of a stage."""
    return {"processes": part.processes, **part.launch}


def share_rows(settings: dict[str, Any], part: Part, book: Book) -> None:
    """Multiply the accumulation by the processes: here the rows of a step are those of all processes."""
    if part.processes == 1:
        return
    trainer = settings["trainer"]
    steps = trainer.get("gradient_accumulation_steps", 1)
    steps = steps.value if isinstance(steps, Noted) else steps
    if type(steps) is not int:
        return
    trainer["gradient_accumulation_steps"] = steps * part.processes
    text = (
        f"`gradient_accumulation_steps` is {steps} × {part.processes} processes: here a step is that of all processes"
    )
    book.note("differs", part.place, text)
