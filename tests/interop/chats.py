"""Renders the chats of tests/fixtures/chat with the installed transformers, and compares their ids.

    chats.py FOLDER             compares with FOLDER/expected.json
    chats.py FOLDER --write     writes it

For each template and each chat that it takes: the ids of `apply_chat_template`, or null where the template refuses it.
Chats that spell special tokens are encoded with `sanitize_control_tokens`, which version 5 has.
"""

import json
import os
import sys
from datetime import datetime

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jinja2  # noqa: E402
import transformers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from transformers.utils import chat_template_utils  # noqa: E402


def fix_date(date):
    class Fixed(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.strptime(date, "%Y-%m-%d")

    chat_template_utils.datetime = Fixed


def ids_of(tokenizer, chat, **options):
    try:
        found = tokenizer.apply_chat_template(
            chat["messages"], tools=chat.get("tools"), tokenize=True, return_dict=False, **options
        )
    except (jinja2.exceptions.TemplateError, TypeError):
        return None
    return list(found)


def main():
    folder = sys.argv[1]
    with open(os.path.join(folder, "chats.json"), encoding="utf-8") as file:
        corpus = json.load(file)
    fix_date(corpus["date"])
    newer = int(transformers.__version__.split(".")[0]) >= 5
    found = {}
    for name, tokens in corpus["templates"].items():
        with open(os.path.join(folder, "templates", name + ".jinja"), encoding="utf-8") as file:
            template = file.read()
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(folder, "tokenizer.json"), **tokens)
        tokenizer.chat_template = template
        found[name] = {chat: ids_of(tokenizer, corpus["chats"][chat]) for chat in corpus["chats"]}
        if newer:
            forged = corpus["forged"]
            found[name] |= {chat: ids_of(tokenizer, forged[chat], sanitize_control_tokens=True) for chat in forged}
    path = os.path.join(folder, "expected.json")
    if "--write" in sys.argv[2:]:
        with open(path, "w", encoding="utf-8") as file:
            rows = [f'"{name}": {json.dumps(chats)}' for name, chats in found.items()]
            file.write("{\n" + ",\n".join(rows) + "\n}\n")
        return
    with open(path, encoding="utf-8") as file:
        expected = json.load(file)
    for name, chats in found.items():
        for chat, ids in chats.items():
            # Version 4 prints fields without a value; version 5 drops them, as this program does.
            if not newer and chat == "calls":
                continue
            if ids != expected[name][chat]:
                sys.exit(f"transformers {transformers.__version__}: {chat} by {name} is {ids}")
    print(json.dumps({"transformers": transformers.__version__}))


main()
