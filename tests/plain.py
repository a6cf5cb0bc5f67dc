"""A model asked with transformers alone, to compare with what the engine makes of it."""


def answer(model, folder, messages, max_new_tokens):
    """The likeliest answer to one conversation, rendered with the chat template of a folder."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    given = {name: asked[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        ids = model.generate(**given, do_sample=False, max_new_tokens=max_new_tokens)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
