"""`quantized_base` of a stage, from the arguments with which other programs load a base in 4 or 8 bits."""

from typing import Any

from pipeline.tools.convert_parts import Arguments, Book, Noted, Part, shown

METHODS = {4: "nf4", 8: "int8"}


def quantize_base(
    take: Arguments, part: Part, book: Book, name: str, bits: Any, kind: Any = "nf4", *, double: bool = True
) -> None:
    """Set `quantized_base`, or say why it is not set; call it when `lora` is set.

    Args:
        name: the argument that asks for it.
        bits: bits of a weight.
        kind: the data type of 4 bits.
        double: whether the scales of 4 bits are quantized too.
    """
    place, given = take.place(name), f"`{name}: {shown(take.given[name].value)}`" if name in take.given else f"`{name}`"
    if bits not in METHODS:
        book.note("not supported", place, f"{given}: a base is in 4 or 8 bits here, or in 16 bits, as it is written")
        return
    if "lora" not in part.settings:
        text = "on a quantized base only an adapter is trained; the whole model is trained here, in 16 or 32 bits"
        book.note("not supported", place, f"{given}: {text}")
        return
    part.settings["quantized_base"] = Noted(METHODS[bits], name)
    text = "`merge` folds the adapter into the base that it was trained on, dequantized; there into the base in 16 bits"
    book.note("differs", place, f"{given}: {text}")
    if bits == 4 and kind != "nf4":
        book.note("differs", place, f"{given}: the 4 bits are NF4 here, and `{kind}` there")
    if bits == 4 and not double:
        text = "the scales are quantized too here (double quantization), which takes 0.4 bits less for each weight"
        book.note("differs", place, f"{given}: {text}")
