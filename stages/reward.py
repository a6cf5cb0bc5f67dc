"""Reward model: a model and preference pairs in, a scorer out, which later stages name as `$reward`.

The scorer is the chain's model with a new head of one label in the place of its language-model head. It reads a whole
conversation, and its score r is the head's logit at the last token. Trained is −log σ(r(chosen) − r(rejected)), the
Bradley-Terry loss of Ouyang et al. (InstructGPT, arXiv 2203.02155); `center_rewards_coefficient` adds the square of
r(chosen) + r(rejected) (Eisenstein et al., 2312.09244).

Rows are tokenized as `select` tokenizes them for a scorer with a chat template: rendered whole, also what the template
writes after the end of turn. A row that is longer than `max_length` is dropped, as its score would be read elsewhere.
The stage below starts from the model above: the language model itself is not changed.
"""

import copy
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from stages import Metrics, Parallel, Scorer, Stage
from stages.model.facts import Facts, Needs
from stages.model.inputs import Inputs
from stages.model.lora import fold_into
from stages.runtime import interfaces
from stages.runtime.errors import Problem, StageError
from stages.runtime.interfaces import source
from stages.training import description, loop, preparation
from stages.training.needs import training_needs
from stages.training.rehearsal import check_adapter, check_libraries
from stages.training.settings import TrainingConfig, check_sampling, check_training, more_memory, training_notes

# What is measured on held-out rows, and `metric_for_best_model` can name; accuracy and margin are called as in `dpo`.
MEASURED = ("loss", "rewards/accuracies", "rewards/margins", "min_reward", "mean_reward", "max_reward")
PAIR = ("reward/chosen", "reward/rejected")  # of each pair, until they are summarized
HEADS = ("lm_head", "embed_out")  # of language models; a scorer has none


class Config(TrainingConfig):
    """Settings of `reward`; `trainer:` takes TRL's RewardConfig. A LoRA adapter is folded in before it is saved."""

    sequences_of_row = 2


# What is known before the first stage starts


def check_model(config: Config, facts: Facts) -> list[Problem]:
    """Problems with the model that the stage starts from, and settings that do not work with it."""
    problems = check_training(config, facts, ["preference"], chat=True, measured=MEASURED)
    problems += check_sampling(config, "pairs")
    for name in ("target_modules", "modules_to_save"):
        given = (config.lora or {}).get(name) or []
        for head in HEADS if not isinstance(given, str) else ():
            if head in given:
                text = f"a reward model has no `{head}`, and its new head is always trained; leave it out"
                problems.append((f"lora.{name}", text))
    if facts.model_type and classifiers() and facts.model_type not in classifiers():
        problems.append(("model", f"{_no_scorer(facts.model_type)}; start from another model"))
    return problems


def _no_scorer(kind: str) -> str:
    return f"transformers has no sequence classification for `{kind}`, which a reward model is"


@cache
def classifiers() -> frozenset[str]:
    """The types of models that transformers can make a scorer of, read from its source; empty when it is not there."""
    text = source("transformers", "models", "auto", "modeling_auto.py")
    found = re.search(r"^MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES = \w+\(\n(.*?)^\)", text, re.M | re.S)
    return frozenset(re.findall(r'\("([\w-]+)",', found[1])) if found else frozenset()


def needs(config: Config, facts: Facts) -> Needs:
    """What training needs without the language-model head; the result is a whole model also with LoRA."""
    if not facts.weights:
        return Needs(0, 0)
    kept = {name: shape for name, shape in facts.weights.items() if not name.startswith(HEADS)}
    scorer = replace(facts, weights=kept)
    scorer = replace(scorer, stored=facts.stored * scorer.parameters // facts.parameters)
    found = training_needs(config, scorer)
    if config.lora is None:
        return found
    whole = min(scorer.stored, 2 * scorer.parameters)  # it takes the place of the adapter
    checkpoints = found.disk - found.left
    return replace(found, disk=checkpoints + max(found.left, whole), result=whole)


# Training


def rehearse(config: Config, inputs: Inputs, out: Path) -> None:
    """Build the settings and prepare the pairs."""
    _trainer_class()
    check_adapter(config, inputs)
    _prepare(config, loop.tokenizer(config, inputs), inputs, out)


def _prepare(config: Config, tokenizer: Any, inputs: Inputs, out: Path) -> preparation.Prepared:
    check_libraries("RewardConfig", config, out)
    settings = loop.row_settings("RewardConfig", config)
    return preparation.prepare(config.draw(inputs), tokenizer, settings, out, whole=True)


def run(config: Config, inputs: Inputs, out: Path) -> Metrics:
    """Train on the pairs and leave the scorer in `out`."""
    kind = _trainer_class()
    tokenizer = loop.tokenizer(config, inputs)
    rows = _prepare(config, tokenizer, inputs, out)
    args = loop.arguments("RewardConfig", config, out, **loop.checkpointing(config, inputs, out))
    trainer = loop.build(
        kind,
        model=scorer(config, inputs, tokenizer),
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.held,
        processing_class=tokenizer,
        peft_config=_adapter(config, inputs),
    )
    metrics = loop.train(trainer, config, inputs, out, save)
    start: dict[str, float] = next((entry for entry in trainer.state.log_history if "loss_at_start" in entry), {})
    return {**rows.account, **metrics, **start}


def scorer(config: TrainingConfig, inputs: Inputs, tokenizer: Any) -> Any:
    """The chain's model with a new head: hidden size → 1, normal with the model's `initializer_range`, under `seed`.

    Raises:
        StageError: transformers has no sequence classification for this type of model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, set_seed

    talker = loop.start(config, inputs, tokenizer)
    shape = copy.deepcopy(talker.config)
    shape.num_labels = 1
    shape.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read before the padding
    try:
        with torch.device("meta"):  # the weights are the chain's: only the head is made
            made = AutoModelForSequenceClassification.from_config(shape)
    except ValueError:
        raise StageError(f"{_no_scorer(shape.model_type)}; start from another model") from None
    setattr(made, made.base_model_prefix, talker.base_model)
    if config.quantized_base is not None:
        made.quantized_base = talker.quantized_base
    set_seed(config.seed)
    for module in made.modules():
        if any(weight.is_meta for weight in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            for weight in module.parameters(recurse=False):
                torch.nn.init.normal_(weight, std=getattr(shape.get_text_config(), "initializer_range", 0.02))
    return made.eval()


def _adapter(config: Config, inputs: Inputs) -> Any:
    """PEFT's LoraConfig, under which the head is trained as well; None when the whole model is trained."""
    if config.lora is None:
        return None
    config = config.model_copy(update={"lora": {**config.lora, "task_type": "SEQ_CLS"}})
    return loop.adapter(config, inputs, head=False)


def save(model: Any, config: TrainingConfig, inputs: Inputs, out: Path) -> None:
    """Write the whole scorer; an adapter is folded in as `merge` does: in float32, rounded once.

    With `quantized_base` it is folded into the starting model as it is stored, which is loaded once more.
    """
    if config.lora is not None:
        adapter = out / "adapter"
        model.save_pretrained(adapter, save_embedding_layers=False)
        model = model.unload()
        if config.quantized_base is not None:
            model.quantized_base.write(adapter)
            settings = {**(config.trainer.get("model_init_kwargs") or {}), "dtype": "auto"}
            trainer = {**config.trainer, "model_init_kwargs": settings}
            as_stored = config.model_copy(update={"quantized_base": None, "trainer": trainer})
            model = scorer(as_stored, inputs, loop.tokenizer(config, inputs))
        fold_into(model, [str(adapter)])
        shutil.rmtree(adapter)
    model.save_pretrained(out)


def _trainer_class() -> Any:
    from trl import RewardTrainer

    interfaces.require("trl", RewardTrainer, "_prepare_dataset")

    class Trainer(RewardTrainer):
        """TRL's RewardTrainer on prepared conversations."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.at_start: dict[str, float] = {}
            super().__init__(*args, **kwargs)
            interfaces.require("trl", self, "_metrics")

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            rewards = outputs.logits.detach().float().squeeze(-1).chunk(2)
            figures = self._metrics["train" if self.model.training else "eval"]
            # Without the pairs that are repeated so that all processes have as many.
            for name, values in zip(PAIR, self.accelerator.gather_for_metrics(rewards), strict=True):
                figures[name] += values.tolist()
            if model.training and self.state.global_step == 0 and not self.at_start:
                self.at_start = {"loss_at_start": float(loss.detach())}
                self.state.log_history.append(self.at_start)  # goes into checkpoints, so a resumed run has it too
            return (loss, outputs) if return_outputs else loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            summarize(self._metrics["train" if self.model.training else "eval"])
            super().log(logs, *args, **kwargs)

    return Trainer


def summarize(figures: dict[str, list[float]]) -> None:
    """Replace figures of batches by those of all their pairs, under the names that `dpo` has for them.

    TRL takes the mean over batches, of whatever size. `figures`: name → one value a batch; under the names of `PAIR`
    one reward a pair, which are removed.
    """
    chosen, rejected = (figures.pop(name, []) for name in PAIR)
    if not chosen:
        return
    del figures["accuracy"], figures["margin"]
    margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
    rewards = chosen + rejected
    figures["rewards/accuracies"] = [sum(margin > 0 for margin in margins) / len(margins)]
    figures["rewards/margins"] = [sum(margins) / len(margins)]
    figures["mean_reward"] = [sum(rewards) / len(rewards)]
    figures["min_reward"], figures["max_reward"] = [min(rewards)], [max(rewards)]


def headline(metrics: Mapping[str, Any]) -> str:
    """The key figure: how many of the held-out pairs are in the right order, before and after."""
    name = "eval_rewards/accuracies"
    if name not in metrics:
        return description.headline(metrics)
    share = f"{metrics[f'{name}_before']:.0%} → {metrics[name]:.0%}"
    return f"held-out preference accuracy {share}{description.of_pairs(metrics)}{description.best(metrics)}"


STAGE = Stage(
    version=2,
    config=Config,
    run=run,
    headline=headline,
    leaves=Scorer(),
    check_model=check_model,
    notes=training_notes,
    more_memory=more_memory,
    needs=needs,
    rehearse=rehearse,
    trains=lambda config: config.training(whole=True),
    settings={"trainer": "trl.trainer.reward_config:RewardConfig", "lora": "peft.tuners.lora.config:LoraConfig"},
    parallel=Parallel(strategies=("ddp", "zero2")),  # its adapter is folded into the whole model at the end
    describe=description.describe,
    figures=description.figures,
)
