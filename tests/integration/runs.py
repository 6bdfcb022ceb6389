"""Trainings and distillations in processes of their own, to be killed, or to share work."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from models import prompts, random_drafter, tiny_model
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from recurrent_drafter.data.encoding import TrainExample
from recurrent_drafter.measure.replies import HeldOutReplies, greedy_replies
from recurrent_drafter.models.config import DraftShape
from recurrent_drafter.models.verifier import Verifier
from recurrent_drafter.training import target_store as target_shards
from recurrent_drafter.training.checkpoints import last_checkpoint
from recurrent_drafter.training.distillation import TokenDraw
from recurrent_drafter.training.examples import collate, with_text_targets
from recurrent_drafter.training.loss import Distillation, Objective
from recurrent_drafter.training.trainer import DrafterTrainer

CONTEXT = multiprocessing.get_context("forkserver")  # which has paid for the imports
CONTEXT.set_forkserver_preload(["recurrent_drafter.training.trainer", "recurrent_drafter.training.target_store"])
KILLED = -signal.SIGKILL
REFUSED = 2


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            die()


class Shared(TrainerCallback):
    """Notes which of a verifier's parameters are sharded at a step."""

    def __init__(self, verifier):
        self.verifier, self.names = verifier, set()

    def on_step_begin(self, args, state, control, **_):
        self.names = {name for name, p in self.verifier.model.named_parameters() if isinstance(p, DTensor)}


class DieWhileSaving(DrafterTrainer):
    """Dies when half of the checkpoint of step 4 is written."""

    def _save_rng_state(self, output_dir):
        if self.state.global_step == 4:
            die()
        super()._save_rng_state(output_dir)


def texts(count, seed=0):
    """Of 3 to 24 tokens, whose first two are context."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        ids = torch.randint(1, 97, (int(torch.randint(3, 25, (), generator=generator)),), generator=generator)
        spans = torch.zeros_like(ids)
        spans[:2] = -1
        examples.append(TrainExample(ids, spans))
    return examples


def train(
    folder: Path, after: int | None, while_saving: bool, world: tuple[int, int, int] | None, options: dict[str, Any]
):
    """Train for eight steps from the last checkpoint; leave every process's weights, and the losses."""
    torch.set_num_threads(1)
    if world is not None:  # what torchrun sets
        rank, processes, port = world
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
    verifier = Verifier(tiny_model("llama"))
    replies = greedy_replies(verifier, [prompts(1, seed)[0][0] for seed in range(2)], 16, ())
    on_cpu = options.pop("on_cpu", False)
    defaults = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1,
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "report_to": "none", "remove_unused_columns": False,
        "disable_tqdm": True, "use_cpu": True, "load_best_model_at_end": False,
        "metric_for_best_model": "eval_tokens_per_step", "greater_is_better": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    if arguments.fsdp and not on_cpu:  # accelerate (1.14) shards where it takes processes to have GPUs
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
    newest, shared = last_checkpoint(folder), Shared(verifier)
    try:
        trainer = (DieWhileSaving if while_saving else DrafterTrainer)(
            random_drafter(emb_norm=True),
            arguments,
            verifier=verifier,
            train_examples=[with_text_targets(example, 4, ()) for example in texts(12)],
            held_out=HeldOutReplies(verifier, replies),
            shape=DraftShape(2, 4),
            callbacks=[shared] if after is None else [DieAfter(after)],
        )
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except ValueError as error:
        (folder / f"refused-{arguments.process_index}").write_text(str(error))
        sys.exit(REFUSED)
    save_file(whole(trainer.drafter.state_dict()), folder / f"final-{arguments.process_index}.safetensors")
    if trainer.is_world_process_zero():
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "best").write_text(str(trainer.state.best_model_checkpoint))
        (folder / "shared.json").write_text(json.dumps(sorted(shared.names)))
        ids = prompts(1)[0]  # read by this process alone
        assert torch.equal(verifier.hiddens(ids), Verifier(tiny_model("llama")).hiddens(ids))


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors put together where they are sharded."""
    return {k: v.full_tensor() if isinstance(v, DTensor) else v.contiguous() for k, v in state.items()}


def run_training(folder, *, after=None, while_saving=False, processes=1, **options) -> list[int]:
    """The exit codes of its processes; the options are `TrainingArguments`'."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    worlds = [None] if processes == 1 else [(rank, processes, port) for rank in range(processes)]
    return ended([CONTEXT.Process(target=train, args=(folder, after, while_saving, w, options)) for w in worlds])


def shard(folder: Path, rank: int, processes: int, port: int):
    """The loss and a gradient of a drafter that FSDP shards; process 0 leaves them beside the whole drafter's own."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    verifier = Verifier(tiny_model("gpt2"))
    rows = [with_text_targets(example, 4, ()) for example in texts(3)]
    results = {}
    for name in ("whole", "sharded"):
        drafter = random_drafter()
        objective = Objective(verifier, drafter.draft_ids.clone(), distillation=Distillation())
        batch = collate(rows)
        if name == "sharded":
            fully_shard(drafter, mesh=init_device_mesh("cpu", (processes,)))
        read = objective.rows(batch, torch.float32)
        value = drafter(read.hidden, read.embedded, objective.chunk_loss(read, objective.counts(batch["targets"])), 5)
        value.backward()
        for part in ("lm_head.2", "rnn_u"):
            gradient = drafter.get_submodule(part).weight.grad
            results[f"{name}.{part}"] = gradient.full_tensor() if name == "sharded" else gradient
        results[f"{name}.loss"] = value.detach()
    if rank == 0:
        save_file(results, folder / "shards.safetensors")
    distributed.destroy_process_group()


def run_shards(folder, processes=2) -> list[int]:
    """The exit codes of its processes."""
    port = free_port()
    return ended([CONTEXT.Process(target=shard, args=(folder, rank, processes, port)) for rank in range(processes)])


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def distil(folder: Path, index: int, processes: int, kill: str):
    """Distil nine texts into shards of two; die after two shards, or in the middle of writing the third."""
    torch.set_num_threads(1)
    target_shards.SHARD_TEXTS = 2
    done = []
    write = target_shards.save_file

    def half(tensors, path):
        write(tensors, path)
        if len(done) == 2:
            os.truncate(path, 100)
            die()

    if kill == "writing":
        target_shards.save_file = half

    def progress(*counts):
        done.append(counts)
        if kill == "between" and len(done) == 2:
            die()

    target_shards.distilled_dataset(
        Verifier(tiny_model("gpt2")), texts(9), 4, (), folder,
        draw=TokenDraw(0.7, 3), on_progress=progress, process=(index, processes),
    )  # fmt: skip


def run_distillation(folder, *, processes=1, kill="") -> list[int]:
    """The exit codes of its processes."""
    return ended([CONTEXT.Process(target=distil, args=(folder, i, processes, kill)) for i in range(processes)])


def ended(processes) -> list[int]:
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
