"""Opens tokenizer folders with the installed transformers.

    folders.py TEXT CHATS FOLDER...     CHATS: a JSON list of {"messages", "tools"}

Prints a list with, for each folder: the ids of the text, the names of its chat templates, and the ids of each chat.
"""

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

from transformers import AutoTokenizer  # noqa: E402


def look(folder, text, chats):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = tokenizer.chat_template
    ids = [
        list(
            tokenizer.apply_chat_template(
                chat["messages"], tools=chat.get("tools"), tokenize=True, return_dict=False
            )
        )
        for chat in chats
    ]
    names = sorted(templates) if isinstance(templates, dict) else templates
    return {"ids": list(tokenizer(text)["input_ids"]), "templates": names, "chats": ids}


def main():
    text, chats = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps([look(folder, text, chats) for folder in sys.argv[3:]]))


main()
