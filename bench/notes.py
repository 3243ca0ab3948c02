"""The predicted columns of bench/notes.md: roofs from exact work and an H200's ceilings."""

from bench import registry
from bench.roofline import H200, roof_ms


def predictions() -> str:
    """One line of a Markdown table a GPU case; the measured columns are written by hand."""
    lines = [
        "| op | case | fwd GFLOP | fwd MB | fwd roof, ms | fwd+bwd roof, ms | bound by |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in registry.baselines() + registry.cases("cuda"):
        passes = case.passes()
        forward, both = passes.of("forward"), passes.of("forward+backward")
        arithmetic = both.flops / H200.gemm_tflops > both.bytes / H200.copy_tb_s
        roofs = [roof_ms(forward, H200)]
        if len(case.modes) > 1 or case.modes[0] != "forward":
            roofs.append(roof_ms(both, H200))
        cells = [case.op, case.name, f"{forward.flops / 1e9:.4g}", f"{forward.bytes / 1e6:.4g}"]
        cells += [f"{roof:.3g}" for roof in roofs] + ["-"] * (2 - len(roofs))
        cells.append("products" if arithmetic else "bytes")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
