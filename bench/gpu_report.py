"""What bench/gpu.py says of its cases: a line for each, a list of checks against the aims, a table to keep."""

from collections.abc import Iterator
from typing import Any, NamedTuple

# Model FLOPs utilization to reach on an H200, by size.
MFU = {"7b": 0.55, "1.4b": 0.50, "0.16b": 0.40}
MASK, DATA_STALL, OF_TEXT_ONLY, CLOCKS = 0.01, 0.005, 0.97, 0.02
PLAN = (0.95, 1.4)  # planned over measured peak: compiled blocks keep less than planned, never much more


class Check(NamedTuple):
    name: str
    aim: str
    value: Any
    passed: bool | None  # None: does not apply to this device, or was not measured


def checks(record: dict[str, Any]) -> list[Check]:
    """Return every check of what was measured; aims for speed apply to a GPU, those for MFU to an H200."""
    on_cuda, cases = record["device_type"] == "cuda", record["cases"]
    found = [check for name, case in cases.items() if "breakdown" in case for check in _of_step(name, case, record)]
    for name, case in cases.items():
        text = cases.get(f"{case.get('size')}-text")
        if case.get("patches") == "linear" and not case["text_only"] and text is not None:
            ratio = case["tokens_per_s"] / text["tokens_per_s"]
            found.append(Check(f"{name}: share of text-only speed", f">= {OF_TEXT_ONLY:.0%}", ratio,
                               ratio >= OF_TEXT_ONLY if on_cuda else None))  # fmt: skip
    for size, attention in cases.get("attention", {}).items():
        right = attention["flex_is_right"]
        found.append(Check(f"attention {size}: flex agrees with float32", "like SDPA in bfloat16", right, right))
    return found


def _of_step(name: str, case: dict[str, Any], record: dict[str, Any]) -> Iterator[Check]:
    on_cuda = record["device_type"] == "cuda"
    aim = MFU.get(case["size"])
    if aim is not None and case["patches"] == "linear" and not case["text_only"]:
        applies = "h200" in record["device"].lower() and case["mfu"] is not None
        yield Check(f"{name}: MFU", f">= {aim:.0%}", case["mfu"], case["mfu"] >= aim if applies else None)
    shares = (("mask", case["breakdown"]["mask"], MASK), ("data stall", case["data_stall_share"], DATA_STALL))
    for what, share, most in shares:
        yield Check(f"{name}: {what}", f"< {most:.1%} of the step", share, share < most if on_cuda else None)
    for what in ("graph_breaks", "recompiled", "host_waits"):
        words, value = what.replace("_", " "), case[what]
        yield Check(f"{name}: {words}", "none", value, None if value is None else not value)
    ratio, agree = case["planned_over_measured"], case["row_step_s"] / case["step_s"] - 1
    fits = None if ratio is None else PLAN[0] <= ratio <= PLAN[1]
    yield Check(f"{name}: planned over measured memory", f"{PLAN[0]} ... {PLAN[1]}", ratio, fits)
    close = abs(agree) <= CLOCKS if on_cuda else None
    yield Check(f"{name}: the log row's step time over the bench's", f"within {CLOCKS:.0%}", 1 + agree, close)


def case_text(name: str, case: dict[str, Any]) -> str:
    """Return the lines of one case."""
    if "breakdown" in case:
        return _step_text(name, case)
    if name == "attention":
        return "\n".join(
            f"attention {size}: flex takes {one['flex_over_causal']:.2f} x causal SDPA's time for "
            f"{one['pairs_of_causal']:.0%} of its pairs, {one['blocks_skipped']:.0%} of blocks skipped, "
            f"mask {one['mask_ms']:.2f} ms, {'right' if one['flex_is_right'] else 'WRONG'}"
            for size, one in case.items()
        )
    if "images_per_s" in case and isinstance(case["images_per_s"], dict):
        rates = ", ".join(f"{rate:.2f} at {rows}" for rows, rate in case["images_per_s"].items())
        return f"sampling {case['size']}: images/s {rates}; {case['steps']} steps"
    return f"{name}: " + ", ".join(
        f"{key} {value:,.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in case.items()
    )


def _step_text(name: str, case: dict[str, Any]) -> str:
    whole = case["layers_of_the_size"]
    layers = f"{case['layers']} layers" + (f" of {whole}" if case["layers"] < whole else "")
    peak, mfu = case["peak_memory_gib"], case["mfu"]
    utilization = f"MFU {mfu:.1%}, HFU {case['hfu']:.1%}" if mfu else f"{case['model_tflops_per_s']:.3g} TFLOP/s"
    memory = f"{peak:.1f} GiB of {case['planned_peak_gib']:.1f} planned" if peak else "memory not measured"
    shares = sorted(case["breakdown"].items(), key=lambda item: -item[1])
    parts = "  ".join(f"{kind} {share:.1%}" for kind, share in shares if share >= 0.0005)
    lines = [
        f"{name}: {layers}, {case['micro_steps']} x {case['rows']} x {case['length']} tokens, "
        f"{case['activation_checkpointing']}: {1e3 * case['step_s']:,.0f} ms, {case['tokens_per_s']:,.0f} tokens/s, "
        f"{utilization}, {memory}; roofline {case['roofline_share']:.0%} of the step; first step "
        f"{case['first_step_s']:.0f} s",
        f"    {parts}",
    ]
    if save := case.get("save"):
        lines.append(
            f"    a save of {save['gb']:.2f} GB stalls {save['stall_s']:.3f} s, the first {save['first_stall_s']:.2f}"
        )
    return "\n".join(lines)


def table(record: dict[str, Any]) -> str:
    """Return the record as a page of Markdown."""
    lines = [
        f"# {record['device']}, torch {record['torch']}",
        "",
        f"`bash bench/gpu.sh`, {record['seconds']:.0f} s.",
        "",
    ]
    columns = "case | layers | rows | recomputed | ms a step | tokens/s | MFU | HFU | GiB (planned) | roofline"
    lines += [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    steps = {name: case for name, case in record["cases"].items() if "breakdown" in case}
    for name, case in steps.items():
        mfu, hfu = (f"{case[key]:.1%}" if case[key] else "" for key in ("mfu", "hfu"))
        peak = f"{case['peak_memory_gib'] or 0:.1f} ({case['planned_peak_gib']:.1f})"
        cells = (name, case["layers"], case["rows"], case["activation_checkpointing"], f"{1e3 * case['step_s']:,.0f}",
                 f"{case['tokens_per_s']:,.0f}", mfu, hfu, peak, f"{case['roofline_share']:.0%}")  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    kinds = sorted({kind for case in steps.values() for kind, share in case["breakdown"].items() if share >= 0.0005})
    lines += [
        "",
        "Shares of a step's device time:",
        "",
        f"| case | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for name, case in steps.items():
        lines.append(f"| {name} | " + " | ".join(f"{case['breakdown'][kind]:.1%}" for kind in kinds) + " |")
    others = [case_text(name, case) for name, case in record["cases"].items() if name not in steps]
    lines += ["", *(f"- {line}" for text in others for line in text.splitlines()), ""]
    lines += [f"- not measured, {name}: {words}" for name, words in record["errors"].items()]
    lines += [f"- not measured, {name}: no time was left" for name in record["skipped"]]
    return (
        "\n".join([*lines, "", "| check | aim | found | |", "|---|---|---|---|", *map(_row, record["checks"])]) + "\n"
    )


def _row(check: dict[str, Any]) -> str:
    verdict = {True: "pass", False: "FAIL", None: "does not apply"}[check["passed"]]
    value = f"{check['value']:.4g}" if isinstance(check["value"], float) else check["value"]
    return f"| {check['name']} | {check['aim']} | {value} | {verdict} |"
