"""Models of every family for the tests, and what transformers makes of folders.

    families.py make OUT TOKENIZER VOCABULARY   writes OUT/<family>/ (random weights, with that tokenizer.json)
    families.py read IDS FOLDER…                prints [{"logits": …, "made": …, "dtype": …}] for a prompt of token ids

Logits are those of every position of the prompt; made are the tokens of a greedy generation.
"""

import json
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch  # noqa: E402
import transformers  # noqa: E402

BASE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": 0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.25], "long_factor": [2.0, 4.0, 8.0]}
FAMILIES = {
    "llama": ("Llama", {"rope_theta": 5e4}),
    "mistral": ("Mistral", {"head_dim": 12, "sliding_window": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2", {}),
    "phi3": ("Phi3", {"rope_scaling": LONG, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 48}),
    "gemma3": ("Gemma3", {"head_dim": 12, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention",
                                                                              "sliding_attention"]}),
}


def make(out, tokenizer, vocabulary):
    for number, (family, (name, changes)) in enumerate(FAMILIES.items()):
        kind = getattr(transformers, name + "ForCausalLM")
        torch.manual_seed(number)
        model = kind(kind.config_class(vocab_size=int(vocabulary), **BASE, **json.loads(json.dumps(changes))))
        with torch.no_grad():
            # Biases and norms are not left at 0 and 1, where mistakes don't show.
            for key, weight in model.named_parameters():
                if weight.dim() == 1:
                    weight.add_(0.1 * torch.randn_like(weight))
        folder = os.path.join(out, family)
        model.save_pretrained(folder)
        shutil.copy(tokenizer, os.path.join(folder, "tokenizer.json"))
    print(json.dumps(list(FAMILIES)))


def read(ids, *folders):
    print(json.dumps([look(folder, torch.tensor([json.loads(ids)])) for folder in folders]))


def look(folder, prompt):
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, torch_dtype=torch.float32)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[key]:
            sys.exit(f"{folder}: {key}: {loading[key]}")
    with torch.no_grad():
        logits = model(prompt, use_cache=False).logits[0]
    # No token ends the text.
    model.generation_config.eos_token_id = None
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        stored = json.load(file)
    return {"logits": logits.flatten().tolist(), "made": made[0, prompt.shape[1]:].tolist(),
            "dtype": [stored.get("dtype"), stored.get("torch_dtype")]}


{"make": make, "read": read}[sys.argv[1]](*sys.argv[2:])
