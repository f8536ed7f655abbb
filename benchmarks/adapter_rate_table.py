"""The table of `adapter_rate.py`: a line a run, full training above."""

from table_parts import Content, about, counted, table

GIB = 2**30
METHODS = {"full": "all weights", "lora": "LoRA", "dora": "DoRA"}


def adapter_rate(content: Content) -> str:
    settings, runs = content["settings"], content["runs"]
    if not runs:
        return "*None of these runs has been made yet.*"
    beside = content.get("beside", "")
    rows = []
    for run in sorted(runs, key=lambda run: (list(METHODS).index(run["method"]), run["lr"], run["seed"])):
        held, answers = run["heldout"], run.get("answers", {})
        span = held["intervals"].get("auc")
        rows.append(
            [
                METHODS[run["method"]],
                f"{run['lr']:g}",
                str(run["seed"]),
                f"{held['auc']:.3f}" + (f" ({span['low']:.3f} to {span['high']:.3f})" if span else ""),
                f"{held['accuracy']:.3f}",
                f"{held['rewards/desirable']:+.1f}",
                f"{held['rewards/undesirable']:+.1f}",
                f"{answers['approved']:.0%}" if answers else "",
                f"{answers['words']:.0f}" if answers else "",
                "" if beside else f"{run['seconds']['training']:.0f}",
                "" if beside else f"{run['step_seconds']:.2f}",
                f"{run['peak_bytes'] / GIB:.2f}",
                f"{run['export_bytes'] / 2**20:.0f}",
            ]
        )
    head = ["trained", "learning rate", "seed", "AUC", "accuracy", "reward, good", "bad", "answers approved", "words"]
    head += ["s of training", "s a step", "peak GiB", "export, MiB"]
    # a column in which nothing was measured, or all is one seed, says nothing
    one_seed = len({run["seed"] for run in runs}) == 1
    keep = [at for at, name in enumerate(head) if any(row[at] for row in rows) and not (name == "seed" and one_seed)]
    shown = table([head[at] for at in keep], [[row[at] for at in keep] for row in rows])
    job = (
        f"the demo's model, {runs[0]['dtype']}, one rank; {counted(settings['steps'], 'step')} of "
        f"{settings['global_batch']} rows, {settings['schedule']}, beta {settings['beta']:g}; adapters of rank "
        f"{settings['rank']}, alpha {settings['alpha']}, on all linear layers but the head"
    )
    scored = sum(run["scored"] for run in runs)
    seed = f" Seed {runs[0]['seed']}." if one_seed else ""
    end = (
        f"All {counted(len(runs), 'run')} read one reference store and scored {scored} log-probs themselves.{seed} AUC "
        "with its 95 % interval over held-out prompts; accuracy counts classes alike."
        + (f" No seconds: they ran {beside}." if beside else "")
    )
    return f"{about(content, job)}\n\n{shown}\n\n{end}"
