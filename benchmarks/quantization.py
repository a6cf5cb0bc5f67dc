"""What the settings of `quantize` are worth: one model, many settings, the same held-out rows.

    python benchmarks/quantization.py MODEL DATA OUT [--only NAME,…]

DATA is the folder that `benchmarks/gates.py` writes: calibration draws from `consult` (the domain, in the model's
template) and `general`; measured is on `consult_held`, `english_held` and `general_held`, which share no row with them.
Every setting is quantized by the stage itself in a process of its own; one that is in OUT/results.jsonl is not done
again, so give another DATA another OUT. Prints the table of docs/quantization.md.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

DOMAIN = {"data": ["consult"], "samples": 64, "max_length": 512}
MIXED = {**DOMAIN, "data": ["consult", "general"]}
ROWS = 40  # of each held-out file
HELD = {"consult_held": "alpaca", "english_held": "text", "general_held": "text"}
FORMATS = {"consult": "alpaca", "general": "text"}


def settings() -> dict[str, dict[str, Any]]:
    """The studied settings by name: one thing is changed at a time, then what helped is put together."""
    base: dict[str, Any] = {"group_size": 64, "mse": 0, "calibration": MIXED}
    found = {"group 64": {}, "group 32": {"group_size": 32}, "mse 2.4": {"mse": 2.4}}
    found |= {"group 32 + mse 2.4": {"group_size": 32, "mse": 2.4}, "no GAR": {"act_group_aware": False}}
    found |= {"desc_act": {"act_group_aware": False, "desc_act": True}, "damp 0.01": {"damp_percent": 0.01}}
    found |= {"damp 0.1": {"damp_percent": 0.1}, "domain only": {"calibration": DOMAIN}}
    found |= {"general only": {"calibration": {**DOMAIN, "data": ["general"]}}}
    found |= {"16 samples": {"calibration": {**MIXED, "samples": 16}}}
    found |= {"128 samples": {"calibration": {**MIXED, "samples": 128}}}
    found |= {"length 128": {"calibration": {**MIXED, "max_length": 128}}}
    found |= {"GPTAQ": {"gptaq": {"alpha": 0.25}}, "FOEM": {"foem": {"beta": 0.2}}, "asymmetric": {"sym": False}}
    found |= {"group 16": {"group_size": 16}}
    fine = {"group_size": 32, "mse": 2.4, "calibration": {**MIXED, "samples": 256}}
    found |= {"group 32 + mse 2.4 + 256 samples": fine, "the same + desc_act": {**fine, **found["desc_act"]}}
    return {name: base | changed for name, changed in found.items()}


def texts(model: str, data: Path, name: str) -> list[list[int]]:
    from stages.data.source import Source, rows_of
    from stages.measuring import calibration
    from stages.model.folder import load_tokenizer

    tokenizer = load_tokenizer([model])
    rows = rows_of(Source(path=str(data / f"{name}.jsonl"), format=HELD[name]))
    return list(calibration._different(rows[:ROWS], tokenizer, Path(model), 512, set()))


def compare(model: str, data: Path, folder: Path, made: Path | None, near: Path | None) -> dict[str, Any]:
    """Leave what the original gives in `folder`; or compare a quantized folder with it, or rounding like one."""
    from stages.measuring import quality
    from stages.model.generation import load_engine

    loaded = load_engine([str(made or model)]).model
    if near is not None:
        quality.rounded(loaded, near)
    found = {}
    for name in HELD:
        file = folder / f"{name}.safetensors"
        if made is None and near is None:
            found[name] = {"losses": quality.reference(loaded, texts(model, data, name), file)}
        else:
            found[name] = quality.compared(loaded, texts(model, data, name), file)
    return found


def quantized(model: str, data: Path, out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the stage does, without its own measuring."""
    from stages import quantize
    from stages.measuring.calibration import calibration_rows, split
    from stages.model.facts import read_facts

    def source(name: str) -> dict[str, Any]:
        return {"path": str(data / f"{name}.jsonl"), "format": FORMATS[name]}

    calibration = {**asked["calibration"], "data": [source(name) for name in asked["calibration"]["data"]]}
    own = {name: value for name, value in asked.items() if name in quantize.Config.model_fields}
    gptq = {name: value for name, value in asked.items() if name not in own}
    config = quantize.Config(model=model, gptq=gptq, **{**own, "calibration": calibration})
    found = calibration_rows(config.calibration, lambda source: source, Path(model), config.seed)
    _, rows = split(found, config.calibration.samples, config.seed)
    work = out / "work"
    out.mkdir(parents=True)
    start = time.perf_counter()
    losses = quantize._quantize(config, read_facts(Path(model)), Path(model), rows, work)
    seconds = time.perf_counter() - start
    quantize._publish(Path(model), work / "model", out)
    figures = quantize._summary(losses, out) | {"seconds": seconds, "bytes_after": quantize._bytes(out)}
    return figures | {"calibration_tokens": sum(map(len, rows))}


def step(*arguments: object) -> Any:
    """One of the functions above, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            __file__,
            "--step",
            json.dumps([str(part) if isinstance(part, Path) else part for part in arguments]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_step(name: str, model: str, data: str, *rest: Any) -> Any:
    if name == "quantize":
        return quantized(model, Path(data), Path(rest[0]), rest[1])
    folder, made, near = rest
    return compare(model, Path(data), Path(folder), made and Path(made), near and Path(near))


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        print("\n" + json.dumps(run_step(*json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", help="names of settings, separated by commas")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    asked = parser.parse_args()
    model, data, out = str(asked.model.resolve()), asked.data.resolve(), asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    wanted = settings() if asked.only is None else {name: settings()[name] for name in asked.only.split(",")}
    for name, setting in wanted.items() if not asked.table else ():
        if not (out / "original.json").exists():
            (out / "original.json").write_text(json.dumps(step("compare", model, data, out, None, None)))
        if any(row["settings"] == setting and row.get("model", model) == model for row in done):
            continue
        made = out / "made"
        shutil.rmtree(made, ignore_errors=True)
        row: dict[str, Any] = {
            "name": name,
            "model": model,
            "settings": setting,
            "stage": step("quantize", model, data, made, setting),
        }
        row["quantized"] = step("compare", model, data, out, made, None)
        plain = f"{setting['group_size']}/{setting.get('sym', True)}/{setting.get('mse', 0)}"
        same = next((old["rounded"] for old in done if old["plain"] == plain), None)
        row["rounded"], row["plain"] = same or step("compare", model, data, out, None, made), plain
        done.append(row)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line(name, row["quantized"], json.loads((out / "original.json").read_text()), row), flush=True)
    print_table(done, json.loads((out / "original.json").read_text()))


def line(name: str, figures: dict[str, Any], original: dict[str, Any], row: dict[str, Any] | None = None) -> str:
    from stages.measuring.metrics import Measured, compare_models

    cells = [name]
    for held in HELD:
        pair = [Measured([(a, b) for a, b in one[held]["losses"]]) for one in (figures, original)]
        change = compare_models("perplexity", pair[0], pair[1], 42)
        low, high = change["ci"]
        cells.append(f"{change['change'] - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})")
    domain = figures["consult_held"]
    cells += [f"{domain['kl']:.3f}", f"{domain['top1_agreement']:.1%}"]
    cells += [f"{row['stage']['bytes_after'] / 1e6:.1f}", f"{row['stage']['seconds']:.0f}"] if row else ["", ""]
    return "| " + " | ".join(cells) + " |"


def print_table(done: list[dict[str, Any]], original: dict[str, Any]) -> None:
    names = ("gptqmodel", "transformers", "torch")
    print(f"Python {platform.python_version()}, {', '.join(f'{name} {metadata.version(name)}' for name in names)}\n")
    print("| setting | " + " | ".join([*HELD, "KL", "top-1", "MB", "seconds"]) + " |\n|" + "---|" * (len(HELD) + 5))
    for row in done:
        print(line(row["name"], row["quantized"], original, row))
    for plain, row in {row["plain"]: row for row in done}.items():
        print(line(f"rounded, group/sym/mse {plain}", row["rounded"], original))


if __name__ == "__main__":
    main()
