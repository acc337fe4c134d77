"""Writes the chats of tests/fixtures/chat/chats.json as a Parquet file, as `datasets` writes them. Needs pyarrow.

    columns.py FOLDER           writes FOLDER/chats.parquet

Every message has every field, null where it has none; tools are a text, since their parameters fit no common column.
"""

import json
import os
import sys

import pyarrow
import pyarrow.parquet

folder = sys.argv[1]
with open(os.path.join(folder, "chats.json"), encoding="utf-8") as file:
    chats = json.load(file)["chats"]
rows = []
for name, chat in chats.items():
    for message in chat["messages"]:
        for call in message.get("tool_calls", []):
            # A list of values of several types, which no column holds.
            del call["function"]["arguments"]["a"]
    tools = chat.get("tools")
    messages = chat["messages"]
    rows.append({"id": name, "messages": messages, "tools": tools and json.dumps(tools), "turns": len(messages)})
table = pyarrow.Table.from_pylist(rows)
pyarrow.parquet.write_table(table, os.path.join(folder, "chats.parquet"), row_group_size=2)
print(table.schema)
