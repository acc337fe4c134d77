"""Opens a model folder as other programs do, and prints the result as JSON.

    look.py FOLDER EXPECTED [--generate]

EXPECTED is JSON: {"text": the text to encode, "ids": its ids by the data's tokenizer,
"eos": {"id": 0, "token": "…"}, "rope_theta": 10000.0}. With --generate the model is loaded, too, and makes three
tokens.
Exits with 1 and a message if the folder is wrong.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import transformers  # noqa: E402
from transformers import AutoConfig, AutoTokenizer  # noqa: E402


def same(what, found, expected):
    if found != expected:
        sys.exit(f"transformers {transformers.__version__}: {what} is {found!r}, not {expected!r}")


def ends(value):
    return value if isinstance(value, list) else [value]


def main():
    folder, expected = sys.argv[1], json.loads(sys.argv[2])
    config = AutoConfig.from_pretrained(folder)
    same("the model's type", config.model_type, "llama")
    rope = getattr(config, "rope_parameters", None) or {}
    same("rope_theta", rope.get("rope_theta", getattr(config, "rope_theta", None)), expected["rope_theta"])
    same("an end token in config.json", expected["eos"]["id"] in ends(config.eos_token_id), True)
    with open(os.path.join(folder, "generation_config.json"), encoding="utf-8") as file:
        generation = json.load(file)
    same("an end token in generation_config.json", expected["eos"]["id"] in ends(generation["eos_token_id"]), True)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    same("the end token", tokenizer.eos_token, expected["eos"]["token"])
    same("the end token's id", tokenizer.eos_token_id, expected["eos"]["id"])
    ids = tokenizer(expected["text"])["input_ids"]
    same("an id beyond the vocabulary", [id for id in ids if id >= config.vocab_size], [])
    same("the ids of the text", ids, expected["ids"])
    same("the text of the ids", tokenizer.decode(ids), expected["text"])
    same("what the model is given", tokenizer.model_input_names, ["input_ids", "attention_mask"])
    # Special tokens that were not asked for would be looked up in an embedding without a row for them.
    same("the highest id", max(tokenizer.get_vocab().values()) < config.vocab_size, True)
    same("the longest text", tokenizer.model_max_length, config.max_position_embeddings)

    made = None
    if "--generate" in sys.argv[3:]:
        import torch
        from transformers import AutoModelForCausalLM

        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            same(key, list(loading[key]), [])
        prompt = torch.tensor([ids])
        made = model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, prompt.shape[1]:].tolist()
        same("tokens made", len(made), 3)
        same("tokens beyond the vocabulary", [id for id in made if id >= config.vocab_size], [])
    print(json.dumps({"transformers": transformers.__version__, "ids": ids, "made": made}))


main()
