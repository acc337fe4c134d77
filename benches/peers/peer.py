#!/usr/bin/env python3
"""PyTorch's side of the comparison: the same Llama, DDP over Gloo, DCP checkpoints.

It prints the events that trainer prints.

  train    trains, saving every few steps with dcp.async_save, or with dcp.save when --blocking
  restore  loads one checkpoint into fresh processes and makes one step
  loss     prints the mean loss of the first validation sequences with a Hugging Face folder's weights

Everything is written the way PyTorch's own documents write it: an AppState, DistributedDataParallel, fused AdamW, eager
mode. The parts that are not the default are there because they are faster (a process group of its own for checkpoints
is needed: a background checkpoint and a training collective on one group wait for each other).
"""

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def turn(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.shared, self.width = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], self.shared * self.width, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], self.shared * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        split = lambda y, heads: y.view(batch, length, heads, self.width).transpose(1, 2)
        query = turn(split(self.q_proj(x), self.heads), cos, sin)
        key = turn(split(self.k_proj(x), self.shared), cos, sin)
        value = split(self.v_proj(x), self.shared)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.shared != self.heads)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = FeedForward(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])


class Llama(nn.Module):
    """Parameter names are those of Hugging Face, and of trainer's files. The output layer is the embedding (tied)."""

    def __init__(self, c, length):
        super().__init__()
        assert c["tie_word_embeddings"] and c.get("rope_scaling") is None
        self.model = Body(c)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=c["initializer_range"])
        frequencies = 1.0 / c["rope_theta"] ** (torch.arange(0, c["head_dim"], 2).float() / c["head_dim"])
        angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        """The mean loss over tokens [batch, T + 1]."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.model.embed_tokens(inputs)
        for layer in self.model.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class AppState(Stateful):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])


def windows(folder, split, length):
    """All sequences of a split, [samples, length + 1]: trainer's windows."""
    index = json.loads((folder / "index.json").read_text())
    found = []
    for shard in index[split]:
        tokens = numpy.fromfile(folder / shard["file"], dtype="<u2" if index["dtype"] == "u16" else "<u4")
        samples = max(0, (len(tokens) - 1) // length)
        found += [tokens[i * length : i * length + length + 1] for i in range(samples)]
    return torch.from_numpy(numpy.stack(found).astype(numpy.int64))


def load_safetensors(model, folder):
    """Copies the weights of a folder's safetensors files into the model; every parameter must be there."""
    missing = dict(model.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "F32", entry
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            values = torch.frombuffer(bytearray(data[begin:end]), dtype=torch.float32)
            with torch.no_grad():
                missing.pop(name).copy_(values.view(entry["shape"]))
    assert not missing, f"no weights for {sorted(missing)}"


def say(**event):
    print(json.dumps(event), flush=True)


class Checkpoints:
    """Where and how checkpoints are kept."""

    def __init__(self, store, blocking):
        self.store, self.blocking = store, blocking
        # Training collectives must not meet a checkpoint's collectives.
        self.group = dist.new_group(backend="gloo")

    def _place(self, step):
        return f"{self.store.removeprefix('file://')}/step-{step}"

    def _s3(self, storage):
        from s3torchconnector import S3ClientConfig
        from s3torchconnector._s3client import S3Client

        # The writer and the reader have no argument for an endpoint; their client has one.
        storage.fs._client = S3Client(
            region=os.environ["AWS_REGION"],
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            s3client_config=S3ClientConfig(force_path_style=True),
        )
        return storage

    def writer(self, step):
        if self.store.startswith("s3://"):
            from s3torchconnector.dcp import S3StorageWriter

            return self._s3(S3StorageWriter(os.environ["AWS_REGION"], self._place(step)))
        return dcp.FileSystemWriter(self._place(step))

    def reader(self, step):
        if self.store.startswith("s3://"):
            from s3torchconnector.dcp import S3StorageReader

            return self._s3(S3StorageReader(os.environ["AWS_REGION"], self._place(step)))
        return dcp.FileSystemReader(self._place(step))


def start(options, rank):
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks, init_method=f"tcp://127.0.0.1:{options.port}")
    torch.manual_seed(1234)
    config = json.loads(options.model.read_text())
    model = DistributedDataParallel(Llama(config, options.sequence_length), gradient_as_bucket_view=True)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-8, fused=True)
    return model, optimizer, windows(options.data, "train", options.sequence_length)


def one_step(model, optimizer, batch, bf16=False):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(options, rank):
    model, optimizer, sequences = start(options, rank)
    checkpoints = Checkpoints(options.store, options.blocking)
    app = {"app": AppState(model, optimizer)}
    share = options.global_batch // options.ranks
    steps, saves, running = [], [], None
    begin = time.perf_counter()
    for step in range(1, options.steps + 1):
        first = ((step - 1) * options.global_batch + rank * share) % (len(sequences) - share)
        loss = one_step(model, optimizer, sequences[first : first + share], options.bf16)
        now = time.perf_counter()
        steps.append((loss, now - begin))
        begin = now
        # Within the next step's time, as trainer counts it.
        if step % options.every == 0 and step < options.steps:
            save = {"step": step}
            if running is not None:
                running.result()
            if options.blocking:
                dcp.save(app, storage_writer=checkpoints.writer(step), process_group=checkpoints.group)
                save["durable_s"] = time.perf_counter() - begin
            else:
                running = dcp.async_save(app, storage_writer=checkpoints.writer(step), process_group=checkpoints.group)
                running.add_done_callback(lambda _, s=save, b=begin: s.update(durable_s=time.perf_counter() - b))
            save["stall_s"] = time.perf_counter() - begin
            saves.append(save)
    if running is not None:
        running.result()
    # A future's work is done before its callbacks: the last one may still be running.
    while any("durable_s" not in save for save in saves):
        time.sleep(0.001)

    everyone = [None] * options.ranks
    dist.all_gather_object(everyone, (steps, saves))
    parameters = sum(p.numel() for p in model.parameters())
    if rank == 0:
        slowest = lambda values: max(values)
        for i in range(options.steps):
            of_all = [theirs[i] for theirs, _ in everyone]
            loss = sum(loss for loss, _ in of_all) / options.ranks
            say(event="step", step=i + 1, loss=loss, step_s=slowest(took for _, took in of_all))
            for j, save in enumerate(saves):
                if save["step"] == i + 1:
                    of_all = [theirs[j] for _, theirs in everyone]
                    stall = slowest(s["stall_s"] for s in of_all)
                    # async_save returns when the state is copied; save copies nothing.
                    copy = None if options.blocking else stall
                    durable = slowest(s["durable_s"] for s in of_all)
                    figures = dict(bytes=12 * parameters, stall_s=stall, copy_s=copy, durable_s=durable)
                    say(event="checkpoint", step=i + 1, **figures)


def restore(options, rank):
    model, optimizer, sequences = start(options, rank)
    checkpoints = Checkpoints(options.store, options.blocking)
    app = {"app": AppState(model, optimizer)}
    dist.barrier()
    begin = time.perf_counter()
    dcp.load(app, storage_reader=checkpoints.reader(options.from_step), process_group=checkpoints.group)
    dist.barrier()
    took = time.perf_counter() - begin
    if rank == 0:
        bytes = 12 * sum(p.numel() for p in model.parameters())
        say(event="restored", step=options.from_step, bytes=bytes, restore_s=took)
    share = options.global_batch // options.ranks
    loss = one_step(model, optimizer, sequences[rank * share : (rank + 1) * share])
    if rank == 0:
        say(event="step", step=options.from_step + 1, loss=loss)
    dist.barrier()


def loss(options):
    torch.set_num_threads(options.threads)
    model = Llama(json.loads(options.model.read_text()), options.sequence_length)
    load_safetensors(model, options.weights)
    sequences = windows(options.data, "validation", options.sequence_length)[: options.validation]
    with torch.no_grad():
        say(loss=model(sequences).item(), sequences=len(sequences))


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["train", "restore", "loss"])
    for name in ["--model", "--data", "--weights"]:
        parser.add_argument(name, type=Path)
    for name in ["--ranks", "--threads", "--global-batch", "--sequence-length", "--validation"]:
        parser.add_argument(name, type=int, required=True)
    for name in ["--steps", "--every", "--from-step", "--port", "--rank"]:
        parser.add_argument(name, type=int)
    parser.add_argument("--store")
    parser.add_argument("--blocking", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="autocast")
    return parser.parse_args()


def main():
    options = parse()
    if options.what == "loss":
        return loss(options)
    work = train if options.what == "train" else restore
    others = []
    if options.port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options.port = free.getsockname()[1]
        command = [sys.executable, *sys.argv, "--port", str(options.port)]
        others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, options.ranks)]
    work(options, options.rank or 0)
    dist.destroy_process_group()
    if any(other.wait() for other in others):
        sys.exit("a rank failed")


if __name__ == "__main__":
    main()
