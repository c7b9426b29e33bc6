"""What gpu.py concludes from its rows, and the page that says it. Pure; imports no torch."""

from statistics import median
from typing import Any

Rows = dict[str, dict[str, Any]]

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp8_blockwise": 2e-3}
"""Of a loss on the GPU, relative to the CPU's. fp32: the order of additions, through five steps of Adam, that
divides small gradients by their own size. bf16 and FP8: numbers that sums in another order round the other
way; on a CPU losses in bf16 are within 7e-4 of those in fp32, and in FP8 within 1.2e-3 of those in bf16."""


def done(rows: Rows) -> Rows:
    """The rows that hold a result."""
    return {name: row for name, row in rows.items() if row["status"] == "done"}


def summary(stages: dict[str, Rows]) -> dict[str, Any]:
    """What is asked of the accelerated stack, from the rows there are."""
    ceiling = done(stages.get("ceiling", {}))
    return {
        "parity": parity(done(stages.get("parity", {}))),
        "steps": steps(done(stages.get("steps", {})), ceiling),
        "fp8": kernels(done(stages.get("fp8", {}))),
        "fused": fused(done(stages.get("fused", {}))),
        "push": {
            name: {"of_copy_bandwidth": row["bytes_per_s"] / ceiling["copy"]["bytes_per_s"]}
            for name, row in done(stages.get("push", {})).items()
            if "copy" in ceiling
        },
    }


def parity(rows: Rows) -> dict[str, dict[str, Any]]:
    """The largest relative difference of a loss from torch_native's on the CPU in the same precision."""
    found = {}
    for name, row in rows.items():
        precision = name.split()[-1]
        reference = rows.get(f"CPU torch_native {precision}")
        if name.startswith("CPU ") or reference is None:
            continue
        pairs = zip(row["losses"], reference["losses"], strict=True)
        differs = max(abs(a - b) / abs(b) for a, b in pairs)
        tolerance = TOLERANCES[precision]
        found[name] = {"differs_by": differs, "tolerance": tolerance, "agrees": differs <= tolerance}
    return found


def steps(rows: Rows, ceiling: Rows) -> dict[str, dict[str, Any]]:
    """Model FLOPs over the measured ceiling of bf16 (``mfu``), of FP8 for FP8 too; tokens over transformers'
    and over those of the same backend in bf16; the peak over its estimate.
    """
    found = {}
    for name, row in rows.items():
        side, precision = name.split()
        others = {"times_transformers": "transformers bf16", "times_bf16": f"{side} bf16"}
        facts = {
            key: row["tokens_per_s"] / rows[of]["tokens_per_s"] for key, of in others.items() if of in rows
        }
        if "bf16" in ceiling:
            facts["mfu"] = row["flops_per_s"] / ceiling["bf16"]["flops_per_s"]
        if precision.startswith("fp8") and "fp8" in ceiling:
            facts["mfu_of_fp8"] = row["flops_per_s"] / ceiling["fp8"]["flops_per_s"]
        if "estimated_bytes" in row:
            facts["peak_of_estimate"] = row["peak_bytes"] / row["estimated_bytes"]
        found[name] = facts
    return found


def kernels(rows: Rows) -> dict[str, dict[str, Any]]:
    """By path: the largest error as a share of the format's bound, and the largest distance from our
    reference.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        products = [row[what] for what in ("forward", "dgrad", "wgrad") if what in row]
        facts = found.setdefault(name.split()[0], {"of_bound": 0.0, "from_reference": 0.0})
        for key in ("of_bound", "from_reference"):
            facts[key] = max(facts[key], *(product[key] for product in products))
    for facts in found.values():
        facts["within_bound"] = facts["of_bound"] <= 1
    return found


def fused(rows: Rows) -> dict[str, dict[str, Any]]:
    """How many times faster each kernel is than Megatron's operations for the same."""
    plain = {name.split()[0]: row["seconds"] for name, row in rows.items() if name.endswith(" megatron")}
    return {
        name: {"times_megatron": plain[name.split()[0]] / row["seconds"]}
        for name, row in rows.items()
        if name.split()[0] in plain
    }


def page(report: dict[str, Any]) -> str:
    """The page, from the content of ``gpu.json``."""
    facts = report["about"]
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items())
    where = facts["gpu"] or "no GPU: this only tries the script"
    lines = [
        "# What was measured on a GPU",
        "",
        f"{where}. `{facts['command']}` at commit `{facts['commit']}`, {facts['date']}, {facts['machine']},",
        f"CUDA {facts['cuda']}; {versions}. {facts['seconds']:.0f} s in all. Raw numbers: gpu.json.",
    ]
    stages, found = report["stages"], report["summary"]
    if facts["gpu"]:
        lines += _asked(found)
    for write in (_ceiling, _parity, _steps, _kernels, _fused, _push):
        lines += write(stages, found)
    lines += _obstacles(stages)
    return "\n".join([*lines, ""])


def _table(title: str, says: str, head: str, rows: list[str]) -> list[str]:
    if not rows:
        return []
    rule = "|---" * (head.count("|") + 1) + "|"
    return ["", f"## {title}", "", says, "", f"| {head} |", rule, *(f"| {row} |" for row in rows)]


ASKED = (
    ("MFU", "torch_native bf16", "mfu", 0.35),
    ("times transformers", "torch_native bf16", "times_transformers", 1.5),
    ("MFU", "transformer_engine bf16", "mfu", 0.45),
    ("times bf16", "transformer_engine fp8_blockwise", "times_bf16", 1.25),
)
"""What a step that fills an H200 is to reach at least."""


def _asked(found: dict[str, Any]) -> list[str]:
    rows = []
    for what, way, key, least in ASKED:
        reached = found["steps"].get(way, {}).get(key)
        if reached is not None:
            holds = "yes" if reached >= least else "NO"
            rows.append(f"{what}, {way} | {least:.2f} | {reached:.2f} | {holds}")
    return _table(
        "What was asked", "Of training steps that fill the card.", "what | at least | found | holds", rows
    )


def _ceiling(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in done(stages.get("ceiling", {})).items():
        if "flops_per_s" in row:
            rows.append(
                f"product {name}, {row['size']} x {row['size']} | {row['flops_per_s'] / 1e12:.1f} TFLOP/s"
            )
        elif "bytes_per_s" in row:
            rows.append(f"copy, read and written | {row['bytes_per_s'] / 1e9:.1f} GB/s")
        else:
            rows.append(f"memory free | {row['free'] / 1e9:.1f} of {row['total'] / 1e9:.1f} GB")
    return _table("Ceiling", "Medians, on random numbers.", "what | measured", rows)


def _parity(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    says = "Largest relative difference of the losses of five steps from those of torch_native on the CPU."
    rows = [
        f"{name} | {fact['differs_by']:.1e} | {fact['tolerance']:.1e} | {'yes' if fact['agrees'] else 'NO'}"
        for name, fact in found["parity"].items()
    ]
    return _table("Parity", says, "way | differs by | tolerance | agrees", rows)


def _steps(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    measured = done(stages.get("steps", {}))
    if not measured:
        return []
    first = next(iter(measured.values()))
    says = (
        f"Qwen3-MoE of {first['layers']} layers, {first['experts']} experts, {first['weights'] / 1e9:.3g} "
        f"billion weights of which {first['active'] / 1e9:.3g} multiply a token; {first['step_tokens']} "
        "tokens a step. MFU: 6 FLOPs a multiplying weight and token and causal attention's, over the "
        "bf16 ceiling."
    )
    rows = []
    for name, row in measured.items():
        fact = found["steps"][name]
        cells = [f"{median(row['seconds']):.3f}", f"{row['tokens_per_s']:.0f}"]
        cells += [_cell(fact, key, form) for key, form in _FACTS]
        peak, estimate = row["peak_bytes"] / 1e9, row.get("estimated_bytes")
        cells.append(f"{peak:.1f}" + (f" of {estimate / 1e9:.1f}" if estimate else ""))
        rows.append(" | ".join([name, *cells]))
    head = (
        "way | seconds | tokens/s | MFU | of FP8's ceiling | x transformers | x bf16 | peak of estimate, GB"
    )
    return _table("Training steps", says, head, rows)


_FACTS = (("mfu", ".1%"), ("mfu_of_fp8", ".1%"), ("times_transformers", ".2f"), ("times_bf16", ".2f"))


def _cell(fact: dict[str, Any], key: str, form: str) -> str:
    return format(fact[key], form) if key in fact else ""


def _kernels(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    says = (
        "Linears in FP8 blocks, forward and both gradients, over shapes with and without outliers: the "
        "largest error from float64 as a share of the format's bound, and the largest distance from our "
        "reference."
    )
    rows = [
        f"{path} | {fact['of_bound']:.2f} | {fact['from_reference']:.1e}"
        for path, fact in found["fp8"].items()
    ]
    return _table("FP8 kernels", says, "path | of the bound | from the reference", rows)


def _fused(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    says = (
        "A row of 8,192 tokens of Qwen3-30B-A3B in bf16, forward and backward. Memory is what is taken "
        "beyond logits, queries and keys; differences are from Megatron's operations."
    )
    rows = [
        f"{name} | {row['seconds'] * 1e3:.2f} | {found['fused'][name]['times_megatron']:.2f} | "
        f"{row.get('extra_bytes', 0) / 1e9:.2f} | {row['differs_by']:.1e}"
        for name, row in done(stages.get("fused", {})).items()
    ]
    return _table("Fused kernels", says, "what, by | ms | x Megatron | GB | differs by", rows)


def _push(stages: dict[str, Rows], found: dict[str, Any]) -> list[str]:
    says = "No engine: tensors of the shapes of Qwen3-30B-A3B's layers. Bytes read and written."
    rows = [
        f"{name} | {row['bytes'] / 1e9:.2f} | {row['copies']} | {row['fused_copies']} | "
        f"{row['bytes_per_s'] / 1e9:.1f} | {_cell(found['push'].get(name, {}), 'of_copy_bandwidth', '.0%')}"
        for name, row in done(stages.get("push", {})).items()
    ]
    return _table("Copies of a push", says, "layout | GB | copies | fused | GB/s | of a plain copy", rows)


def _obstacles(stages: dict[str, Rows]) -> list[str]:
    rows = [
        f"{stage}: {name} | {row['status']} | {row['reason'].replace('|', '/')}"
        for stage, found in stages.items()
        for name, row in found.items()
        if row["status"] != "done"
    ]
    return _table("What did not run", "Each with its reason.", "what | how | reason", rows)
