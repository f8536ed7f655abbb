"""The planner's curves to 4,096 GPUs, which `scaling.py --curves` computes and draws. Nothing of them is measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
KINDS = ("A100", "H100", "H200", "B200", "MI300X")


def curves() -> dict[str, Any]:
    """Weak scaling of an 8 billion parameter model: 16 rows a GPU and step, of 500 tokens on average. Computed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kto_dist.cluster.hardware import cluster_of
    from kto_dist.cluster.plan import plan
    from kto_dist.cluster.workload import of_means
    from kto_dist.model.footprint import shape_of
    from kto_dist.training.config import Config

    with torch.device("meta"):
        lm = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=32,
                hidden_size=4096,
                intermediate_size=14336,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=128256,
                tie_word_embeddings=False,
            )
        )
    shape, lines = shape_of(lm), []
    assumed: dict[str, float] = {}
    for kind in KINDS:
        for gpus in GPUS:
            config = Config.build(
                {
                    "model": {"path": "model"},
                    "data": {"train": "rows", "max_length": 2048},
                    "train": {"global_batch": 16 * gpus},
                }
            )
            made = plan(config, shape, of_means(config, 10**7, 200, 300), cluster_of(kind, gpus))
            assumed |= asdict(made.cluster.shares)
            assumed |= {f"{kind} {name}": getattr(made.cluster.gpu, name) for name in ("matmul", "attention")}
            best = made.best
            if best is None:
                continue
            lines.append(
                {
                    "gpu": kind,
                    "gpus": gpus,
                    "tokens_per_second_and_gpu": best.tokens_per_second / gpus,
                    "seconds_per_step": best.seconds.total,
                    "collectives": best.seconds.collectives / best.seconds.total,
                    "mfu": best.mfu,
                    "zero_stage": best.way.zero_stage,
                    "checkpointing": best.way.checkpointing,
                    "offload_optimizer": best.way.offload_optimizer,
                    "bytes": best.memory.device,
                }
            )
    return {"computed": True, "assumptions": assumed, "results": lines}


def draw(content: dict[str, Any], file: Path) -> None:
    """The curves, with what they assume beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5))
    for kind in KINDS:
        lines = [line for line in content["results"] if line["gpu"] == kind]
        axes.plot(
            [line["gpus"] for line in lines],
            [line["tokens_per_second_and_gpu"] for line in lines],
            marker="o",
            markersize=3,
            label=kind,
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs, 8 a node")
    axes.set_ylabel("tokens a second and GPU")
    axes.set_title("Computed, not measured: 8 billion parameters, 16 rows of 500 tokens a GPU and step", fontsize=10)
    text = "assumed\n" + "\n".join(
        f"{name.replace('_', ' ')}: {value:g}" for name, value in content["assumptions"].items()
    )
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.subplots_adjust(right=0.72)
    figure.text(0.74, 0.5, text, fontsize=7, va="center")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
