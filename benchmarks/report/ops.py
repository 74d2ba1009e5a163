"""The ops' part of the report: each row of their result files beside its limit and its baselines."""

from collections.abc import Mapping

from benchmarks.analysis.roofline import Ops, fastest_copy_gbps, ours_ms, point, points
from benchmarks.common.markdown import table

CAPTION = "roofline: FLOP/s against FLOP per byte, each op, case, dtype and pass"


def summary(ops: Ops, matmul_gflops: Mapping[str, float]) -> str:
    """What the roofline plot shows, and each op's share of its limits in numbers."""
    rates = "".join(f", a large {dtype} matmul {gflops:.0f} GFLOP/s" for dtype, gflops in matmul_gflops.items())
    shares: dict[str, list[float]] = {}
    for p in points(ops, matmul_gflops):
        shares.setdefault(p.op, []).append(p.share)
    listed = ", ".join(f"`{op}` {100 * min(found):.0f}–{_percent(max(found))}" for op, found in shares.items())
    return (
        f"FLOP/s reached by mvar's kernels against the FLOPs that an op needs for each byte it must move at least. A "
        f"copy reaches {fastest_copy_gbps(ops):.0f} GB/s here at best{rates}; the limit of an op is the copy of as "
        f"many bytes, or the matmul if that is slower. Reached of it: {listed}. Arithmetic outside matmuls, as in "
        "adaLN and in token sampling, is slower than a matmul's.\n"
    )


def comparison(ops: Ops, matmul_gflops: Mapping[str, float]) -> str:
    rows = []
    for op, of_op in ops.items():
        for row in of_op:
            ours, found, ms = ours_ms(row), point(op, row, matmul_gflops), row["median_ms"]
            untimed = "–" if row.get("wrong") == {} else "wrong, not timed"  # –: no kernel for this device
            baselines = (
                f"{name} {t:.3g}" + (f" ({t / min(ours.values()):.1f}×)" if ours else "")
                for name, t in ms.items()
                if name not in ours and name != "copy"
            )
            rows.append(
                (
                    f"`{op}` {row['case']}",
                    f"{row['dtype']} {row['pass']}",
                    ", ".join(f"{t:.3g}" for t in ours.values()) or untimed,
                    _percent(found.share) if found else "–",
                    f"{ms['copy']:.3g}",
                    ", ".join(baselines) or "–",
                )
            )
    return (
        "Milliseconds; in brackets the time relative to mvar's. The limit is the slower of two: a copy of as many "
        "bytes as the op must move at least, and as many FLOPs as it must do at the rate of a large matmul.\n\n"
    ) + table(("op, case", "dtype, pass", "mvar", "of the limit", "copy", "baselines"), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
