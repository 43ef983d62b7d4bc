"""A plan as text, to be read at a glance."""

from typing import Any

from train.console import plural
from train.planning.plan import PlanConfig

BAR = 40  # characters for all memory at the peak
WORDS = {
    "parameters": "trained parameters (float32, its shard)",
    "frozen": "frozen parameters (in the compute dtype)",
    "optimizer": "the optimizer's states",
    "ema": "averages of the parameters",
    "gradients": "gradients (float32, its shard)",
    "gathered": "gathered parameters and gradients",
    "forward": "activations",
    "backward": "temporaries of the backward pass",
    "update": "temporaries of the update",
    "batch": "the batch",
    "preview": "the whole model, to draw previews",
}


def plan_text(config: PlanConfig, plan: dict[str, Any]) -> str:
    """Return a plan in paragraphs: parameters, memory, time."""
    parts = _parameters(config, plan), _memory(config, plan), _time(config, plan)
    return "\n\n".join("\n".join(lines) for lines in parts)


def _parameters(config: PlanConfig, plan: dict[str, Any]) -> list[str]:
    trunk, counts = config.model.transformer, plan["parameters"]
    size, rows = config.model.patch_size, counts["embeddings"] // trunk.width
    padded = f", padded to {rows:,}" if rows > plan["vocab_size"] else ""
    tied = " is the embedding" if config.model.tied_embeddings else ""
    notes = {
        "total": "",
        "embeddings": f"{plan['vocab_size']:,} token ids{padded} ({plan['vocab_size_from']})",
        "blocks": f"{trunk.layers} layers of width {trunk.width}, {trunk.heads} heads",
        "patches": f"{config.model.patches}, {size}x{size} cells per token",
        "heads": f"the text head{tied}; the noise head is among the patches",
    }
    trained = plan["trained_parameters"]
    some, of_a_token = trained["total"] < counts["total"], plan["parameters_of_a_token"]
    lines = ["parameters" + (f"{'trained':>38}" if some else "")]
    for name, count in counts.items():
        share = f"  {name:<11}{count / 1e6:>12,.2f}M {100 * count / max(1, counts['total']):6.2f} %"
        lines.append((share + f"{trained[name] / 1e6:>12,.2f}M" * some + f"  {notes[name]}").rstrip())
    if of_a_token < counts["total"]:
        lines.append(f"  {'of a token':<11}{of_a_token / 1e6:>12,.2f}M  model.untied={config.model.untied}")
    return lines


def _memory(config: PlanConfig, plan: dict[str, Any]) -> list[str]:
    device = "CPU rank" if config.gpu_type is None else config.gpu_type.name
    usable, peak = plan["usable_memory_gib"], plan["peak_memory_gib"]
    lines = [
        f"memory of each {device} at the peak, in {plan['peak_in']}: {plan['sequences_a_micro_step']} x "
        f"{config.data.sequence_length} tokens at once"
    ]
    for kind, words in WORDS.items():
        size = plan["memory_at_peak_gib"].get(kind, 0.0)
        if size >= 0.005:
            lines.append(f"  {words:<42}{size:>9.2f} GiB  {_bar(size / peak)}")
    verdict = "fits" if plan["fits"] else "does not fit"
    limit = f"of {usable:.2f} usable for tensors ({plan['device_memory_gib']:.1f} in all)"
    lines.append(f"  {'in all: ' + verdict:<42}{peak:>9.2f} GiB  {limit}")
    if not plan["fits"]:
        switches = " ".join(plan["would_fit_with"] or ["none of the switches tried"])
        lines.append(f"  would fit with {switches}")
    lines.append(
        f"  recomputed in backward: {plan['activation_checkpointing']} ({plan['activation_checkpointing_because']})"
    )
    host = plan["host_memory_gib"]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in host.items() if size >= 0.005)
    lines.append(f"  host memory of a rank, at most            {sum(host.values()):>10.2f} GiB  {parts}")
    return [*lines, f"  a checkpoint on disk                      {plan['checkpoint_gib']:>10.2f} GiB"]


def _bar(share: float) -> str:
    eighths = round(share * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _time(config: PlanConfig, plan: dict[str, Any]) -> list[str]:
    machines = -(-config.world_size // config.gpus_per_node)
    sent = plan["sent_gb_a_step_and_rank"]
    parts = ", ".join(f"{name.replace('_', ' ')} {size:.1f}" for name, size in sent.items() if size >= 0.05)
    tokens, tflop, again = plan["tokens_a_step"], plan["step_tflop"], plan["recomputed_tflop"]
    lines = [
        f"a step of {plural(config.world_size, 'rank')} on {plural(machines, 'machine')}",
        f"  batch          {tokens:,.0f} tokens: {config.data.lanes} sequences of {config.data.sequence_length}; "
        f"micro-steps per rank: {plan['micro_steps']}",
        f"  trains on      {plan['text_targets_a_step']:,.0f} text targets and {plan['images_a_step']:,.0f} images"
        + (f", given {clean:,.0f} clean ones" if (clean := plan["clean_images_a_step"]) else ""),
        f"  work           {tflop:,.0f} TFLOP, {tflop * 1e12 / tokens:.3g} FLOP per token",
        f"  sent           {sum(sent.values()):.1f} GB per rank" + (f": {parts}" if parts else ""),
    ]
    total = f"{plan['steps']:,} steps, {plan['tokens'] / 1e9:,.1f}B tokens in all"
    if "predicted" in plan:
        lines += _predicted(plan)
        total += f": {plan['days']:,.1f} days, {plan['gpu_hours']:,.0f} GPU-hours"
    elif "step_s" in plan:
        share, speed = plan["communication_share_of_compute"], plan["tokens_per_s"]
        bound = "hidden behind it where prefetching works" if share < 1 else "which cannot hide it: the limit"
        lines += [
            f"  compute        {plan['compute_s_a_step']:.2f} s at an MFU of {config.mfu:.0%}"
            + (f", {again / (tflop + again):.0%} of it for recomputation" if again else ""),
            f"  communication  {plan['communication_s_a_step']:.2f} s, {share:.0%} of the compute, {bound}",
            f"  speed          {speed:,.0f} tokens/s, {speed / config.world_size:,.0f} per GPU",
        ]
        total += f": {plan['days']:,.1f} days, {plan['gpu_hours']:,.0f} GPU-hours"
    return [*lines, f"  documents      {plan['data_from']}", total]


def _predicted(plan: dict[str, Any]) -> list[str]:
    """Return a table of steps on other numbers of GPUs."""
    lines = [
        f"  predicted from what one {plan['kernels_of']} reached",
        "    GPUs   sequences  recomputes   compute  exposed communication     step       tokens/s    MFU  efficiency"
        "     days",
    ]
    for row in plan["predicted"]:
        cells = [
            f"  {row['gpus']:>6,}  {row['rows']:>5} x {row['micro_steps']:<3}",
            f"{row['activation_checkpointing']:>10}  {row['compute_s']:>6.2f} s",
            f"{row['exposed_communication_s']:>19.2f} s  {row['step_s']:>5.2f} s  {row['tokens_per_s']:>12,.0f}",
            f"{row['mfu']:>5.1%}  {row['efficiency']:>9.1%}  {row['days']:>7.1f}",
        ]
        lines.append("  ".join(cells) + ("" if row["fits"] else "  does not fit"))
    return lines
