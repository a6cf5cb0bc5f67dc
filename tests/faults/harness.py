"""A stage in, and what became of a run that was ended with kill -9 at its k-th change of a file, for every k, out.

    python -m tests.faults.harness --stages kto,reward,select,evaluate,sft+rows,rehearsal --jobs 2 --table out.md

`chains.py` has the runs that `--stages` names.

`calls.py` counts every system call that changes a file below the run's outputs, in all processes, native code
included, and ends the process that makes the k-th one. Then the run is done again without a fault, and must end as
the uninterrupted one: the same record of files (sha256), the same files on disk, no work folder; a third run must
change nothing. One process imports torch and its friends once and forks a runner for each run; the runner forks
its stage instead of asking a server for it. Apart from that the runs are those of `pipeline run`.
So all runs here have one order of sets; tests/run/test_runner.py tests that the stages of all runs have.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import count, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.run.runner import GATES
from pipeline.saves import artifact as artifact_module
from pipeline.saves.artifact import RECORD
from stages.runtime.hashes import HASHES, Hashes
from stages.runtime.processes import end_with_parent
from stages.training.checkpoint import MARK
from stages.training.preparation import FOLDER
from tests.faults import calls
from tests.faults.calls import CONTENT, LOG, Call, Ended
from tests.faults.chains import CASES, STAGES, Case, write

LIMIT = 300  # seconds after which a run counts as hanging; FAULTS_LIMIT sets others, for a machine that is busy
WHOLE = ("pt",)  # in a sample these have every call that makes a checkpoint or a folder count
FEW = ("sft", "dpo", "merge", "quantize", "add_tokens", "sft+rows", "rehearsal")  # in a sample these have few calls
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Point:
    """Where a run is to end: before the `number`-th call of its kind, or after half of its bytes."""

    stage: str
    kind: str
    number: int
    torn: bool = False

    def __str__(self) -> str:
        return f"{self.stage}:{self.kind}:{self.number}" + (":torn" if self.torn else "")

    @classmethod
    def read(cls, text: str) -> "Point":
        stage, kind, number, *torn = text.split(":")
        return cls(stage, kind, int(number), torn == ["torn"])


@dataclass
class Result:
    """What became of a point; no `failures` is what everyone hopes for."""

    point: Point
    fault: Call | None
    """The call that a process was ended at; None when the run came to its end."""
    torn: int | None
    """Bytes of it that were written."""
    victim: str = ""
    resumed: bool = False
    failures: list[str] = field(default_factory=list)
    seconds: float = 0

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Result":
        fault = values["fault"]
        return cls(**{**values, "point": Point(**values["point"]), "fault": fault and Call(**fault)})


class Slot:
    """A folder in which one trial at a time happens. Artifacts hold absolute paths, so each has its own chains."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saves, self.output = folder, folder / "saves", folder / "output.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self.configs = {chain: write(folder, chain) for chain in STAGES}

    def run(self, case: Case, point: Point | None = None) -> Ended:
        """`pipeline run --until STAGE` in processes of its own, ended at a point or not."""
        at = None if point is None else (point.kind, point.number)
        return calls.watch(lambda: self._runner(case), self.saves, at, torn=point is not None and point.torn)

    def _runner(self, case: Case) -> int:
        """Be the runner: what the command `pipeline` does."""
        from pipeline import cli

        signal.alarm(int(os.environ.get("FAULTS_LIMIT", LIMIT)))
        output = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        return cli.main(["run", str(self.configs[case.chain]), "--saves", str(self.saves), "--until", case.stage])

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def base(self, case: Case) -> Path:
        """The outputs of the uninterrupted chain."""
        return self.folder / f"base-{case.chain}"

    def prepare(self, case: Case) -> None:
        """Fresh outputs with all that is there before a case."""
        shutil.rmtree(self.saves, ignore_errors=True)
        for name in case.above:
            folder = self.artifact(self.base(case), case, name)
            shutil.copytree(folder, self.saves / folder.name)
            (self.saves / case.chain).mkdir(exist_ok=True)
            os.symlink(f"../{folder.name}", self.saves / case.chain / name)
        if case.rows:
            shutil.copytree(self.base(case) / FOLDER, self.saves / FOLDER)
        self.remember()

    def remember(self) -> None:
        """Know the artifacts' hashes, as the runs that made them would have left them."""
        files = sorted(path for path in self.saves.glob("*-*/*") if path.is_file())
        if files:
            with open(self.saves / HASHES, "w", encoding="utf-8") as file:
                clock = artifact_module._clock(file.fileno(), max(path.stat().st_ctime_ns for path in files))
            hashes = Hashes(self.saves / HASHES)
            hashes.of(files, clock=clock)
            hashes.save()

    def artifact(self, saves: Path, case: Case, stage: str) -> Path:
        return (saves / case.chain / stage).resolve()

    def state(self, saves: Path, case: Case) -> dict[str, Any]:
        """What must be the same however often a run was ended."""
        names = STAGES[case.chain]
        folder = self.artifact(saves, case, case.stage)
        others = {self.artifact(self.base(case), case, name).name for name in names}
        others |= {FOLDER}  # not every stage prepares rows
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        gates = [verdict for verdict in _gates(saves / case.chain) if verdict["stage"] == case.stage]
        return {
            "files": record["files"],
            "metrics": record["metrics"],
            "on disk": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
            "beside": sorted({path.name for path in saves.iterdir()} - others),
            "half prepared": sorted(path.name for path in saves.glob(f"{FOLDER}/*.part")),
            "links": sorted({path.name for path in (saves / case.chain).iterdir()} - {*names, GATES}),
            "gates": {verdict["text"]: verdict["passed"] for verdict in gates},
        }

    def make_base(self, case: Case) -> None:
        """The uninterrupted chain down to a stage."""
        shutil.rmtree(self.saves, ignore_errors=True)
        done = self.run(case)
        if done.status:
            raise RuntimeError(f"the uninterrupted chain ended with {done.status}:\n{self.said()}")
        self.saves.rename(self.base(case))

    def trace(self, name: str) -> list[Call]:
        """The calls of an uninterrupted run, which must end as the chain's did."""
        case = CASES[name]
        self.prepare(case)
        done = self.run(case)
        if done.status:
            raise RuntimeError(f"the uninterrupted `{name}` ended with {done.status}:\n{self.said()}")
        if differences := _differences(self.state(self.base(case), case), self.state(self.saves, case)):
            raise RuntimeError(f"two uninterrupted runs of `{name}` differ: {differences}")
        if case.rows and "takes the rows that were prepared before" not in self.said():
            raise RuntimeError(f"`{name}` prepared rows that were there:\n{self.said()}")
        return [self.short(call) for call in done.calls]

    def short(self, call: Call) -> Call:
        """The call with its path below the outputs."""
        return replace(call, path=call.path.replace(f"{self.saves}/", ""))

    def trial(self, point: Point) -> Result:
        """End a run at a point, run again, and again."""
        started = time.monotonic()
        case = CASES[point.stage]
        self.prepare(case)
        ended = self.run(case, point)
        result = Result(point, ended.fault and self.short(ended.fault), ended.torn)
        if ended.fault is not None:
            result.victim = "runner" if ended.fault.pid == ended.pid else "stage"
            result.failures += self._check_death(ended, result.victim)
        elif ended.status:
            result.failures.append(f"without a fault it ended with {ended.status}: {self.said()[-2000:]}")
        again = self.run(case)
        result.resumed = "; goes on at step" in self.said()
        if again.status:
            result.failures.append(f"the run after it ended with {again.status}: {self.said()[-2000:]}")
        else:
            result.failures += _differences(self.state(self.base(case), case), self.state(self.saves, case))
        third = self.run(case)
        if third.status or third.calls:
            paths = [f"{call.name} {call.path}" for call in third.calls[:3]]
            result.failures.append(
                f"a further run ended with {third.status} and made {len(third.calls)} calls: {paths}"
            )
        result.seconds = round(time.monotonic() - started, 2)
        return result

    def _check_death(self, ended: Ended, victim: str) -> list[str]:
        """A killed stage is a failure that the runner tells; a killed runner takes its stage along."""
        said = "was ended by signal 9 SIGKILL" in self.said()
        if victim == "runner" and (ended.status != -signal.SIGKILL or set(ended.left) - {-signal.SIGKILL}):
            return [f"the killed runner ended with {ended.status}, what it left behind with {ended.left}"]
        if victim == "stage" and (ended.status != 1 or not said or ended.left):
            return [f"with its stage killed the runner ended with {ended.status}: {self.said()[-2000:]}"]
        return []


def _gates(links: Path) -> list[dict[str, Any]]:
    """The verdicts of the last run; none where no stage has gates."""
    file = links / GATES
    return list(json.loads(file.read_text(encoding="utf-8"))["gates"]) if file.exists() else []


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A sentence for each part of the state that is not as it should be."""
    sentences = []
    for key, value in expected.items():
        if found[key] == value:
            continue
        if isinstance(value, dict):
            names = [name for name in value.keys() | found[key].keys() if value.get(name) != found[key].get(name)]
            parts = [f"{name}: {value.get(name)} → {found[key].get(name)}" for name in sorted(names)]
        else:
            parts = [f"-{name}" for name in value if name not in found[key]]
            parts += [f"+{name}" for name in found[key] if name not in value]
        sentences.append(f"{key} differ: " + ", ".join(parts))
    return sentences


def points(name: str, trace: list[Call]) -> list[Point]:
    """Every content call, every write of them half done, and a log call wherever content calls leave room for some.

    Between two content calls only the two logs grow, so one of the log calls there stands for all.
    """
    wanted = [call for call in trace if CASES[name].at in call.path]
    found = [Point(name, CONTENT, call.number) for call in wanted if call.kind == CONTENT]
    found += [Point(name, CONTENT, call.number, torn=True) for call in wanted if call.kind == CONTENT and call.size]
    for call, after in pairwise(wanted):
        if call.kind == LOG and after.kind == CONTENT:
            found += [Point(name, LOG, call.number, torn=bool(call.size))]
    return found


def sample(name: str, trace: list[Call]) -> list[Point]:
    """One call of each kind, at another place of the run in each case; of the cases in FEW every fourth kind.

    A kind is what the call does and whether the runner or the stage makes it. Each write is also tried half done. Of
    the cases in WHOLE also every call that seals the first checkpoint, writes the record or renames the folder, and of
    all cases those that write the verdicts of gates.
    """
    wanted = [call for call in trace if call.kind == CONTENT and CASES[name].at in call.path]
    kinds: dict[tuple[str, bool], list[Call]] = {}
    for call in wanted:
        kinds.setdefault((call.name, call.pid == trace[0].pid), []).append(call)  # a run begins in its runner
    turn, found = list(CASES).index(name), []
    for number, alike in enumerate(kinds.values()):
        if name not in FEW or (number + turn) % 4 == 0:
            place = (turn + len(CASES) * number) * GOLDEN % 1  # no two places of all cases and kinds are close
            found.append(alike[int(place * len(alike))])
    if name in WHOLE:
        record = min(call.number for call in wanted if call.path.endswith(RECORD))
        sealed = min(call.number for call in wanted if call.path.endswith(MARK))  # the rename of the mark
        found += [call for call in wanted if MARK in call.path and call.number <= sealed]
        found += [call for call in wanted if RECORD in call.path]
        found += [call for call in wanted if call.name == "rename" and call.number > record]
    found += [call for call in wanted if call.path.endswith(GATES)]
    torn = {call.number for call in found if call.name == "write" and not call.path.endswith(RECORD)}
    torn = [Point(name, CONTENT, number, torn=True) for number in sorted(torn)]
    return [Point(name, CONTENT, number) for number in sorted({call.number for call in found})] + torn


class Tasks:
    """Runs functions of a slot in forked processes, one for each slot at a time."""

    def __init__(self, slots: list[Slot]) -> None:
        self.free, self.running = list(slots), {}  # type: list[Slot], dict[int, tuple[Slot, Any]]

    def map(self, items: Iterator[Any], function: Callable[[Slot, Any], Any]) -> Iterator[tuple[Any, Any]]:
        """Each item and what the function made of it, as they end."""
        for item in items:
            while not self.free:
                yield self._wait()
            slot = self.free.pop()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                self._be(slot, item, function)
            self.running[pid] = (slot, item)
        while self.running:
            yield self._wait()

    def _be(self, slot: Slot, item: Any, function: Callable[[Slot, Any], Any]) -> None:
        code = 1
        try:
            answer = json.dumps(function(slot, item))
            (slot.folder / "answer.json").write_text(answer, encoding="utf-8")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _wait(self) -> tuple[Any, Any]:
        pid, status = os.wait()
        slot, item = self.running.pop(pid)
        if status:
            raise RuntimeError(f"{item}: the harness itself failed with status {status}; see above")
        self.free.append(slot)
        return item, json.loads((slot.folder / "answer.json").read_text(encoding="utf-8"))


def import_everything() -> None:
    """What the runner's server imports, once; no thread may be started and no tensor made in this process."""
    import importlib

    from pipeline.run import process, rehearsal, runner, worker
    from pipeline.run.process import ENVIRONMENT, PRELOAD
    from pipeline.saves import artifact as artifact_module

    os.environ.update({**ENVIRONMENT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    for name in (
        *PRELOAD,
        "pipeline.cli",
        "pipeline.views.progress",
        *(f"stages.{name}" for name in {name for names in STAGES.values() for name in names}),
        "tests.warm",
        *("nltk", "rouge_chinese", "jieba"),
    ):
        importlib.import_module(name)
    sys.modules["jieba"].initialize()  # reads its dictionary

    class Forked(process.Forked):
        """A stage forked from the runner itself, with the fresh process that `quantize` asks forked before it."""

        def __init__(self, part: Path, hook: worker.Hook = "run") -> None:
            os.close(os.open(part / artifact_module.LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
            fork = multiprocessing.get_context("fork")
            ours, theirs = fork.Pipe()
            self.fresh = None
            if json.loads((part / runner.SPEC).read_text(encoding="utf-8"))["use"] == "quantize":
                self.fresh = fork.Process(target=_be_fresh, args=(theirs, ours))
                self.fresh.start()
            self.process = fork.Process(target=_be_stage, args=(str(part / runner.SPEC), hook, ours, theirs))
            self.process.start()
            self.pid = self.process.pid
            ours.close()
            theirs.close()

        def exit_code(self) -> int | None:
            if self.fresh is not None:
                self.fresh.join()  # it ends when nobody can ask it any more
            return super().exit_code()

    for module in (runner, rehearsal):
        module.Forked = Forked


def plan_once(configs: Iterable[Path]) -> None:
    """Read the settings of the libraries once, which every runner would read again."""
    from pipeline import cli

    for config in configs:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = cli.main(["validate", str(config)])
        if code:
            raise RuntimeError(said.getvalue())
    gc.collect()
    gc.freeze()


def _be_fresh(channel: Connection, other: Connection) -> None:
    """The process that nothing of the stage can help: it reads a folder and changes no file."""
    from stages.measuring import quality

    end_with_parent()
    other.close()
    try:
        request = channel.recv()
    except EOFError:
        os.kill(os.getpid(), signal.SIGKILL)  # as what a killed runner leaves behind ends
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    channel.send(quality.respond(request))


def _be_stage(spec: str, hook: Any, channel: Connection, other: Connection) -> None:
    from pipeline.run import worker
    from stages.measuring import quality

    other.close()

    def ask(module: str, request: Mapping[str, Any]) -> Any:
        assert module == quality.__name__
        channel.send(json.loads(json.dumps(request)))
        return channel.recv()

    quality.in_fresh_process = ask
    worker.main(spec, hook)


def make_bases(slots: list[Slot], names: list[str]) -> int:
    """Make, in every slot, each chain down to the last stage that is wanted; returns how many were made."""
    made = 0
    for chain, stages in STAGES.items():
        wanted = [CASES[name] for name in names if CASES[name].chain == chain]
        if wanted:
            last = max(wanted, key=lambda case: stages.index(case.stage))
            # one task keeps its slot until all slots have one
            made += len(list(Tasks(slots).map(iter(slots), lambda slot, _, last=last: slot.make_base(last))))
    return made


def enumerate_faults(
    slots: list[Slot], wanted: dict[str, list[Point]], traces: dict[str, list[Call]], ends: list[str]
) -> Iterator[Result]:
    """The result of every wanted point, and, for `ends`, of the first point that no call reaches any more."""
    every = [point for stage in wanted for point in wanted[stage]]
    every.sort(key=lambda point: (point.torn, point.kind))  # stopped early, it has been at every call of every stage
    for _, found in Tasks(slots).map(every, _trial):
        yield Result.read(found)
    for stage in ends:
        last = sum(call.kind == CONTENT for call in traces[stage])
        for number in count(last + 1):
            ((_, found),) = Tasks(slots[:1]).map([Point(stage, CONTENT, number)], _trial)
            yield Result.read(found)
            if found["fault"] is None:
                break


def _trial(slot: Slot, point: Point) -> dict[str, Any]:
    return asdict(slot.trial(point))


def _known(file: Path | None) -> list[Result]:
    """What an earlier call found before it was stopped."""
    if file is None or not file.exists():
        return []
    return [Result.read(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def table(traces: dict[str, list[Call]], results: list[Result]) -> str:
    """Markdown: a row a stage."""
    head = ["stage", "calls", "killed before a call", "killed in a write", "killed at a log line", "no call left"]
    head += ["went on from a checkpoint", "ended the same", "seconds each"]
    lines = [" | ".join(["", *head, ""]).strip(), "|" + " --- |" * len(head)]
    for stage, trace in traces.items():
        mine = [result for result in results if result.point.stage == stage]
        groups = [
            [r for r in mine if r.fault and r.point.kind == CONTENT and not r.point.torn],
            [r for r in mine if r.fault and r.point.kind == CONTENT and r.point.torn],
            [r for r in mine if r.fault and r.point.kind == LOG],
            [r for r in mine if not r.fault],
        ]
        good = sum(not r.failures for r in mine)
        cells = [stage, str(sum(call.kind == CONTENT for call in trace)), *(str(len(group)) for group in groups)]
        cells.append(str(sum(r.resumed for r in mine)))
        cells.append(f"{good} of {len(mine)}")
        cells.append(f"{sum(r.seconds for r in mine) / max(1, len(mine)):.1f}")
        lines.append(" | ".join(["", *cells, ""]).strip())
    names = Counter(call.name for trace in traces.values() for call in trace if call.kind == CONTENT)
    lines += ["", "| stage | " + " | ".join(names) + " |", "|" + " --- |" * (1 + len(names))]
    for stage, trace in traces.items():
        own = Counter(call.name for call in trace if call.kind == CONTENT)
        lines.append(f"| {stage} | " + " | ".join(str(own[name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", default=",".join(CASES), help=f"which, with commas between: {', '.join(CASES)}")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--sample", action="store_true", help="only what seals and finishes, and some others")
    parser.add_argument("--points", help="only these, such as pt:content:40,pt:content:44:torn")
    parser.add_argument("--table", type=Path, help="a file for the table")
    parser.add_argument("--results", type=Path, help="a file for one JSON line a point; its points are not done again")
    arguments = parser.parse_args()
    if (reason := calls.missing()) is not None:
        print(reason, file=sys.stderr)
        return 2
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(CASES):
        parser.error(f"--stages: unknown {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    only = [Point.read(text) for text in arguments.points.split(",")] if arguments.points else None
    if only is not None:
        stages = [stage for stage in CASES if any(point.stage == stage for point in only)]
    started = time.monotonic()
    import_everything()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        # The names are not in ASCII, so that files with paths in them are also cut inside of characters.
        slots = [Slot(Path(folder, f"试验-{number}").resolve()) for number in range(arguments.jobs)]
        plan_once(slots[0].configs.values())
        ready = make_bases(slots, stages)
        found = Tasks(slots).map(stages, lambda slot, stage: [asdict(call) for call in slot.trace(stage)])
        by_stage = {stage: [Call(**call) for call in trace] for stage, trace in found}
        traces = {stage: by_stage[stage] for stage in stages}
        if only is not None:
            wanted = {stage: [point for point in only if point.stage == stage] for stage in stages}
        elif arguments.sample:
            wanted = {stage: sample(stage, traces[stage]) for stage in stages}
        else:
            wanted = {stage: points(stage, traces[stage]) for stage in stages}
        results = _known(arguments.results)
        known = {result.point for result in results}
        wanted = {stage: [point for point in wanted[stage] if point not in known] for stage in stages}
        total = sum(map(len, wanted.values())) + len(results)
        print(f"{ready} chains and {len(traces)} traces after {time.monotonic() - started:.0f} s; {total} points")
        ends = [stage for stage in stages if stage not in FEW or not arguments.sample]
        for result in enumerate_faults(slots, wanted, traces, ends):
            results.append(result)
            if arguments.results:
                with open(arguments.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
            for failure in result.failures:
                print(f"{result.point} ({result.fault}): {failure}")
            if len(results) % 25 == 0:
                print(f"{len(results)} of {total} points after {time.monotonic() - started:.0f} s", flush=True)
    text = table(traces, results)
    print(text)
    if arguments.table:
        arguments.table.write_text(text, encoding="utf-8")
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
