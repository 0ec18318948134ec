"""Table, ratios and agreement that `inference.py` prints, computed from the answers of its contestants."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from inference_contestants import OURS, Contestant

# Above this, the load of other processes affects the figures.
QUIET_CPUS = 0.1

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def figures_of(entry: Contestant, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: medians over the rounds."""

    def median_rate(tokens: str, seconds: str) -> float | None:
        """Return the median rate, or None if the engine does not report it."""
        if any(answer.get(seconds) is None for answer in answers):
            return None
        return statistics.median(answer[tokens] / answer[seconds] for answer in answers)

    rates = [answer["generated_tokens"] / answer["seconds"] for answer in answers]
    return {
        "engine": entry.name,
        "kind": entry.kind,
        "dtype": entry.dtype,
        "batch": entry.batch,
        "prefill tok/s": median_rate("prompt_tokens", "prefill_seconds"),
        "decode tok/s": median_rate("decode_tokens", "decode_seconds"),
        "generated tok/s": statistics.median(rates),
        "slowest and fastest round, tok/s": [min(rates), max(rates)],
        "peak RSS bytes": max(answer["peak_rss_bytes"] for answer in answers),
        "CPUs busy with others' work": [answer["others_cpus"] for answer in answers],
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| engine | dtype | batch | prefill tok/s | decode tok/s | generated tok/s end to end (range) | peak RSS |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        slowest, fastest = row["slowest and fastest round, tok/s"]
        print(
            f"| {row['engine']} | {row['dtype']} | {row['batch']} | {_whole(row['prefill tok/s'])} "
            f"| {_whole(row['decode tok/s'])} | {row['generated tok/s']:,.1f} ({slowest:,.1f} to {fastest:,.1f}) "
            f"| {row['peak RSS bytes'] / 1e9:.2f} GB |"
        )
    others = [value for row in rows for value in row["CPUs busy with others' work"]]
    print(f"\nOther processes kept {statistics.median(others):.2f} CPUs busy (median), {max(others):.2f} at most.")
    if max(others) > QUIET_CPUS:
        print("This machine is not quiet: threads that spin while they wait lose most, so do not trust the ratios.")
    print()


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def print_lines(title: str, lines: Mapping[str, Any]) -> None:
    """Print one name and its value per line."""
    print(f"{title}:")
    for name, value in lines.items():
        print(f"- {name}: {f'{value:,.3f}' if isinstance(value, float) else value}")
    print()


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return our rates divided by those of the best peer of the same dtype, and by those of each kind of Levanter."""
    found: dict[str, float] = {}
    for rate, dtype in itertools.product(("generated tok/s", "decode tok/s"), ("float32", "bfloat16")):
        of_dtype = [row for row in rows if row["dtype"] == dtype and row[rate] is not None]
        ours = [row for row in of_dtype if row["kind"] == OURS]
        peers = [row for row in of_dtype if row["kind"] not in (OURS, "levanter")]
        rivals = [max(peers, key=lambda row: row[rate])] if peers else []
        rivals += [row for row in of_dtype if row["kind"] == "levanter"]
        for own, rival in itertools.product(ours, rivals):
            best = "" if rival["kind"] == "levanter" else f"best {dtype} peer, "
            name = f"{rate}: ours {dtype} / {best}{rival['engine']} at batch {rival['batch']}"
            found[name] = own[rate] / rival[rate]
    return found


def agreement(entries: Sequence[Contestant], answers: Answers) -> dict[str, str]:
    """Return how many prompts each other contestant in float32 answers with exactly our tokens.

    A different order of summation rounds differently, so engines diverge where two tokens are about equally likely,
    and a sequence that has diverged stays so: the first difference shows how far the two did the same work.
    """
    in_fp32 = [entry for entry in entries if entry.dtype == "float32"]
    ours = next((entry for entry in in_fp32 if entry.kind == OURS), None)
    found: dict[str, str] = {}
    for entry in in_fp32:
        if ours is None or entry is ours:
            continue
        pairs = zip(answers[ours.label][0]["tokens"], answers[entry.label][0]["tokens"], strict=True)
        differences = [_first_difference(own, other) for own, other in pairs]
        same = sum(position is None for position in differences)
        at = sorted(position for position in differences if position is not None)
        text = f"{same} of {len(differences)} prompts"
        if at:
            text += f"; the others diverge after {at[0]} to {at[-1]} tokens, median {statistics.median(at):g}"
        found[entry.label] = text
    return found


def _first_difference(own: Sequence[int], other: Sequence[int]) -> int | None:
    different = (index for index, (left, right) in enumerate(zip(own, other, strict=True)) if left != right)
    return next(different, None)


def ceiling_fractions(
    rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Mapping[str, float]], num_parameters: int
) -> dict[str, float]:
    """Return the fraction of the matmul rate that our decoding reaches, at 2 operations per parameter and token.

    The matmuls of attention are not counted.
    """
    found: dict[str, float] = {}
    for row in rows:
        if row["kind"] == OURS and row["decode tok/s"] is not None:
            for name, rate in ceilings[row["dtype"]].items():
                if "^3" in name or name.startswith("all products"):
                    found[f"decode {row['dtype']} / {name}"] = row["decode tok/s"] * 2 * num_parameters / rate
    return found
