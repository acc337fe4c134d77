"""Reads an event file with TensorBoard's own reader: prints every scalar as {tag: [[step, value, seconds], ...]}."""

import json
import sys

from tensorboard.backend.event_processing import event_accumulator

accumulator = event_accumulator.EventAccumulator(
    sys.argv[1], size_guidance={event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0}
)
accumulator.Reload()
tags = accumulator.Tags()
scalars = {
    tag: [[event.step, event.value, event.wall_time] for event in accumulator.Scalars(tag)] for tag in tags["scalars"]
}
texts = {
    tag: accumulator.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for tag in tags["tensors"]
    if accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "text"
}
json.dump({"scalars": scalars, "texts": texts}, sys.stdout)
