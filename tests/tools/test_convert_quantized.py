"""A base in 4 or 8 bits in configs of other programs is `quantized_base` here, and what differs is told."""

from pathlib import Path

import pytest
from converted import notes, stages, written

LLAMAFACTORY = "model_name_or_path: org/base\nstage: sft\ndo_train: true\ndataset: alpaca_en_demo\noutput_dir: out\n"
AXOLOTL = "base_model: org/base\nadapter: lora\ndatasets:\n  - path: org/rows\n    type: alpaca\noutput_dir: out\n"
TRL = "model_name_or_path: org/base\ndataset_name: org/rows\nuse_peft: true\noutput_dir: out\n"
MEDICALGPT = "python supervised_finetuning.py --model_name_or_path org/base --train_file_dir data --output_dir out"
MERGED = "`merge` folds the adapter into the base that it was trained on, dequantized; there into the base in 16 bits"
DOUBLE = "the scales are quantized too here (double quantization), which takes 0.4 bits less for each weight"


def converted(name, text):
    """The settings of the stage, and what is said of the base."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    found, pipeline = written(name)
    stage = next(stage for stage in stages(pipeline).values() if stage.training is not None)
    words = ("bit", "qlora", "quantiz", "NF4", "adapter: qlora", "gptq", "bnb")
    said = [text for text in notes(found, "differs", "not supported", "unknown") if any(word in text for word in words)]
    return stage.config, said


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


CASES = {
    "LLaMA-Factory, 4 bits": (
        "x.yaml",
        LLAMAFACTORY + "quantization_bit: 4\n",
        "nf4",
        [f"`quantization_bit: 4`: {MERGED}"],
    ),
    "LLaMA-Factory, FP4 without double quantization": (
        "x.yaml",
        LLAMAFACTORY + "quantization_bit: 4\nquantization_type: fp4\ndouble_quantization: false\n",
        "nf4",
        [
            f"`quantization_bit: 4`: {MERGED}",
            "`quantization_bit: 4`: the 4 bits are NF4 here, and `fp4` there",
            f"`quantization_bit: 4`: {DOUBLE}",
        ],
    ),
    "LLaMA-Factory, another library": (
        "x.yaml",
        LLAMAFACTORY + "quantization_bit: 8\nquantization_method: hqq\n",
        "int8",
        ["`quantization_method: hqq`: bitsandbytes quantizes the base here", f"`quantization_bit: 8`: {MERGED}"],
    ),
    "LLaMA-Factory, 3 bits": (
        "x.yaml",
        LLAMAFACTORY + "quantization_bit: 3\n",
        None,
        ["`quantization_bit: 3`: a base is in 4 or 8 bits here, or in 16 bits, as it is written"],
    ),
    "Axolotl": (
        "x.yml",
        AXOLOTL.replace("adapter: lora", "adapter: qlora") + "load_in_4bit: true\n",
        "nf4",
        [f"`load_in_4bit: true`: {MERGED}"],
    ),
    "Axolotl, 8 bits": ("x.yml", AXOLOTL + "load_in_8bit: true\n", "int8", [f"`load_in_8bit: true`: {MERGED}"]),
    "Axolotl, FP4": (
        "x.yml",
        AXOLOTL + "load_in_4bit: true\nbnb_config_kwargs:\n  bnb_4bit_quant_type: fp4\n",
        "nf4",
        [f"`load_in_4bit: true`: {MERGED}", "`load_in_4bit: true`: the 4 bits are NF4 here, and `fp4` there"],
    ),
    "TRL": (
        "sft.yaml",
        TRL + "load_in_4bit: true\nuse_bnb_nested_quant: true\n",
        "nf4",
        [f"`load_in_4bit: true`: {MERGED}"],
    ),
    "TRL without double quantization": (
        "sft.yaml",
        TRL + "load_in_4bit: true\n",
        "nf4",
        [f"`load_in_4bit: true`: {MERGED}", f"`load_in_4bit: true`: {DOUBLE}"],
    ),
    "TRL without an adapter": (
        "sft.yaml",
        TRL.replace("use_peft: true", "use_peft: false") + "load_in_8bit: true\n",
        None,
        [
            "`load_in_8bit: true`: on a quantized base only an adapter is trained; the whole model is trained here, in "
            "16 or 32 bits"
        ],
    ),
    "MedicalGPT": (
        "run.sh",
        f"{MEDICALGPT} --load_in_4bit True --qlora True\n",
        "nf4",
        [f"`load_in_4bit: true`: {MERGED}"],
    ),
    "MedicalGPT without qlora": (
        "run.sh",
        f"{MEDICALGPT} --load_in_4bit True\n",
        "nf4",
        [
            f"`load_in_4bit: true`: {MERGED}",
            "`load_in_4bit: true`: the 4 bits are NF4 here, and `fp4` there",
            f"`load_in_4bit: true`: {DOUBLE}",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_base_in_4_or_8_bits_is_a_setting_of_the_stage(name):
    file, text, method, said = CASES[name]
    config, found = converted(file, text)
    assert config.quantized_base == method
    assert (config.lora is not None) == ("without an adapter" not in name)
    assert found == said
