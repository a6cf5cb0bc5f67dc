"""A scorer and an embedder whose figures are known without computing them, and conversations for them."""

WORDS = {"好": [1.0, 0.0], "坏": [-1.0, 0.0], "上": [0.0, 1.0]}
"""Word → its embedding, which RMSNorm makes as long as √2."""


def talk(question, answer, *more):
    roles = ("user", "assistant") * 3
    said = zip(roles, (question, answer, *more), strict=False)
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def save_scorer(folder):
    """A model without layers: the hidden state of a token is its embedding, and the reward the first axis of the last.

    That is √2 after 好, -√2 after 坏, 0 after 上; every other character counts as 上.
    """
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{word: place for place, word in enumerate(WORDS, 2)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="上"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    sizes = {"vocab_size": 5, "hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=1, pad_token_id=0, rms_norm_eps=0.0))
    with torch.no_grad():
        model.model.embed_tokens.weight[2:] = torch.tensor(list(WORDS.values()))
        model.score.weight[:] = torch.tensor([[1.0, 0.0]])
    model.save_pretrained(folder)
    return folder
