"""`trainer:` of a training command of LLaMA-Factory."""

from typing import Any

from pipeline.tools.convert_llamafactory_arguments import READ, SAME
from pipeline.tools.convert_parts import Arguments, Book, Part, is_off
from pipeline.tools.convert_trainer import Trainer

DEFAULT = "the default there"
ATTENTION = {
    **{"disabled": "eager", "false": "eager", "sdpa": "sdpa"},
    **{"fa2": "flash_attention_2", "true": "flash_attention_2", "fa3": "flash_attention_3"},
}
LOSSES = ("sigmoid", "hinge", "ipo")


class Settings:
    """What the arguments of one command say about `trainer:` of its stage."""

    def __init__(self, arguments: Arguments, part: Part, book: Book) -> None:
        self.arguments, self.part, self.book = arguments, part, book
        self.trainer = Trainer(arguments, book)

    def _note(self, kind: Any, name: str, text: str) -> None:
        self.book.note(kind, self.arguments.place(name), text)

    def write(self) -> None:
        """`trainer:` and what else belongs to a stage of this kind."""
        take, part, trainer = self.arguments, self.part, self.trainer
        trainer.take_same(part.kind, part.settings, SAME, READ)
        trainer.default("max_length", 2048, DEFAULT)
        trainer.default("learning_rate", 5e-5, DEFAULT)
        self._packing()
        self._precision()
        trainer.shared(part.kind)
        if take.flag("disable_gradient_checkpointing"):
            trainer.set("gradient_checkpointing", False, "disable_gradient_checkpointing")
        if take.flag("disable_shuffling"):
            trainer.set("train_sampling_strategy", "sequential", "disable_shuffling")
        attention = str(take.take("flash_attn", "auto")).lower()
        if attention in ATTENTION:
            trainer.model("attn_implementation", ATTENTION[attention])
        elif attention != "auto":
            self._note("unknown", "flash_attn", f"`flash_attn: {attention}`; there is auto, {', '.join(ATTENTION)}")
        if take.flag("enable_liger_kernel"):
            trainer.model("use_kernels", True)
        if part.kind == "pt":
            self._texts()
        self._preferences()
        self._pairs_of_answers()
        self._trackers()
        trainer.finish(part)

    def _packing(self) -> None:
        take, kind, trainer = self.arguments, self.part.kind, self.trainer
        neat, packing = take.flag("neat_packing"), take.take("packing")
        if kind == "pt":
            packs = packing is None or not is_off(packing)
            trainer.set("packing", packs, "" if packing is not None else DEFAULT)
        elif kind == "sft" and (neat or not is_off(packing)):
            trainer.set("packing", True, "neat_packing" if neat else "")
            if not neat:
                text = "packed rows read one another in LLaMA-Factory without `neat_packing`; here they never do"
                self._note("differs", "packing", text)
        elif not is_off(packing):
            self._note("not supported", "packing", f"`packing`: pairs and labelled rows of `{kind}` are not packed")

    def _texts(self) -> None:
        """What differs between texts in LLaMA-Factory and in `pt`."""
        template = self.arguments.text("template")
        text = "the loss of `pt` is smaller in LLaMA-Factory by one part in the tokens of a row"
        reason = "its transformers also counts the first token of a row, which is not predicted"
        self.book.note("differs", self.part.place, f"{text}: {reason}")
        text = "here each text begins with it, in LLaMA-Factory only with `add_bos_token` and without packing"
        self.book.note("differs", self.part.place, f"where a tokenizer begins texts with BOS: {text}")
        if not self.trainer.has("packing"):
            text = (
                "LLaMA-Factory leaves out the rest of a text that is longer than `cutoff_len`, here the rest is trained"
            )
            self._note("differs", "packing", f"`packing: false`: {text}")
        if template is not None:
            text = "LLaMA-Factory ends each text with the end token of this template, here the tokenizer's EOS ends it"
            self._note("differs", "template", f"`template: {template}`: {text}")

    def _precision(self) -> None:
        take, trainer = self.arguments, self.trainer
        bf16, fp16, pure = take.take("bf16"), take.take("fp16"), take.flag("pure_bf16")
        if pure:
            trainer.set("bf16", False, "pure_bf16: weights in bfloat16, no autocast")
            trainer.model("dtype", "bfloat16")
        elif not is_off(fp16):
            trainer.set("fp16", True)
            if "lora" in self.part.settings:  # its base is in float16 there; ours would be in float32 without bfloat16
                trainer.model("dtype", "float16")
        else:
            trainer.set("bf16", not is_off(bf16), "" if bf16 is not None else DEFAULT)

    def _preferences(self) -> None:
        """What belongs to preference data alone."""
        take, trainer, kind = self.arguments, self.trainer, self.part.kind
        if kind == "reward":
            trainer.set("disable_dropout", False, DEFAULT)
        if kind != "dpo":
            return
        loss, ftx, bco = (
            str(take.take("pref_loss", "sigmoid")),
            take.number("pref_ftx", 0),
            take.number("pref_bco_weight", 0),
        )
        if loss not in LOSSES:
            text = f"`pref_loss: {loss}`: this loss is not supported; `sigmoid` is written instead"
            self._note("not supported", "pref_loss", text)
            loss = "sigmoid"
        elif loss != "sigmoid":
            text = (
                f"`pref_loss: {loss}`: LLaMA-Factory 0.9.5 trains `sigmoid` whatever is asked; here `{loss}` is trained"
            )
            self._note("differs", "pref_loss", text)
        added = {name: weight for name, weight in (("sft", ftx), ("bco_pair", bco)) if not is_off(weight)}
        trainer.set("loss_type", [loss, *added] if added else loss, "pref_loss" if not added else "pref_loss, pref_ftx")
        if added:
            trainer.set("loss_weights", _weights(ftx, bco), "")
        if "sft" in added:
            text = "LLaMA-Factory takes the mean of each chosen answer first, here every token counts the same"
            self._note("differs", "pref_ftx", f"`pref_ftx: {ftx}`: {text}")
        if "bco_pair" in added:
            text = "LLaMA-Factory subtracts the running mean of the rewards, here nothing is subtracted"
            self._note("differs", "pref_bco_weight", f"`pref_bco_weight: {bco}`: {text}")
        self._reference()

    def _pairs_of_answers(self) -> None:
        """The KL term of KTO is estimated from other rows of a batch, so that a batch has two rows or more."""
        trainer = self.trainer
        if self.part.kind != "kto":
            return
        if trainer.found.get("per_device_eval_batch_size") == 1:
            trainer.set("per_device_eval_batch_size", 2, "a batch of `kto` has two rows or more")
        if trainer.found.get("per_device_train_batch_size") == 1:
            steps = trainer.found.get("gradient_accumulation_steps", 1)
            steps = steps if isinstance(steps, int) else 1
            trainer.set("per_device_train_batch_size", 2, "a batch of `kto` has two rows or more")
            trainer.set("gradient_accumulation_steps", max(1, steps // 2), "halved: as many rows a step as there")
            text = "`per_device_train_batch_size: 1` becomes 2, because the KL term needs other rows of the batch"
            self._note("differs", "per_device_train_batch_size", text)

    def _reference(self) -> None:
        take, part = self.arguments, self.part
        model, adapters = take.text("ref_model"), take.words("ref_model_adapters")
        same = model in (None, part.model) and (adapters == part.adapters or not adapters)
        if model is not None and not same:
            text = f"`ref_model: {model}`: the reference is always the model that the stage starts from"
            self._note("not supported", "ref_model", text)

    def _trackers(self) -> None:
        take, trainer = self.arguments, self.trainer
        if take.flag("use_swanlab"):
            trainer.report_to(["swanlab"])
        metric = take.take("metric_for_best_model")
        if metric is not None:
            accuracy = "rewards/accuracies" if self.part.kind in ("dpo", "reward") else "mean_token_accuracy"
            word = str(metric).removeprefix("eval_")
            trainer.set("metric_for_best_model", accuracy if word == "accuracy" else word)


def _weights(ftx: Any, bco: Any) -> list[float]:
    """Weights of the preference loss, `sft` and `bco_pair`; LLaMA-Factory divides the first and the last by 1 + bco."""
    whole = 1 if is_off(bco) else 1 + bco
    shares = [1 / whole] + ([] if is_off(ftx) else [ftx]) + ([] if is_off(bco) else [bco / whole])
    return [int(share) if share == int(share) else round(share, 9) for share in shares]
