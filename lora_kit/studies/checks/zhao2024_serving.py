"""Checks of Zhao et al. 2024, section 6: latencies of LoRAX with and without 25 adapters.

Requests have 30 to 500 tokens in and 1 to 120 out, so 60.5 out on average. No table prints how many
requests were sent, or a spread: nothing in this section has an error bar.
"""

from __future__ import annotations

from lora_kit.studies.checks.outcome import (
    CONTRADICTED,
    HOLDS,
    OVERSTATED,
    ROUNDING,
    Outcome,
    all_of,
    cell,
    check,
    equals,
    holds_if,
    some_of,
    text,
)

PAPER = "zhao2024"
USERS = (1, 5, 10, 20, 50)
TOTAL, FIRST, STREAM = "Total request time", "Time to first token, TTFT", "Token streaming time"
ALONE, MANY = (
    "0 adapters (base model), 1 concurrent user",
    "25 adapters (base model), 100 concurrent user",
)
TOKENS_OUT = (1 + 120) / 2


def ms(table: int, what: str, users: int, which: str = "average") -> float:
    """A latency of tables 8 (base) and 9 (25 adapters)."""
    return cell(PAPER, f"table_{table:02}", f"{what} / {which}", f"{users} concurrent users").value


def switching(what: str, column: str, which: str = "Average") -> float:
    return cell(PAPER, "table_07", what, f"{column} / {which}").value


@check
def switching_costs_7_ms() -> Outcome:
    difference = switching(TOTAL, MANY) - switching(TOTAL, ALONE)
    return equals(
        text(PAPER, "6.3", "cost of switching, total request time"), difference, unit=" ms"
    )


@check
def switching_leaves_streaming_alone() -> Outcome:
    one, two = switching(STREAM, ALONE), switching(STREAM, MANY)
    return holds_if(abs(two / one - 1) < 0.01, f"{one:g} and {two:g} ms", "1 %")


@check
def switching_is_isolated() -> Outcome:
    found = "adapters go from 0 to 25 and users from 1 to 100 in the same step"
    changed = (ALONE.split(",")[0] != MANY.split(",")[0]) + (
        ALONE.split(",")[1] != MANY.split(",")[1]
    )
    return Outcome(HOLDS if changed == 1 else OVERSTATED, found)


@check
def one_token_has_no_streaming_time() -> Outcome:
    """One new token: the first is the last, and the time between the two is nothing."""
    times = [switching(STREAM, column) for column in (ALONE, MANY)]
    return holds_if(max(times) < 1, f"{times[0]:g} and {times[1]:g} ms with one new token", "1 ms")


@check
def load_grows_fiftyfold() -> Outcome:
    return equals(text(PAPER, "6.3", "load from 1 to 50 users, increase"), USERS[-1] / USERS[0])


@check
def first_token_slower_by_ms() -> Outcome:
    printed = text(PAPER, "6.3", "TTFT from 1 to 50 users, increase")
    difference = ms(8, FIRST, 50) - ms(8, FIRST, 1)
    ten = ms(8, FIRST, 10) - ms(8, FIRST, 1)
    outcome = equals(printed, difference, unit=" ms")
    return Outcome(
        outcome.verdict, f"{outcome.found}; {ten:.2f} ms is 1 to 10 users", outcome.tolerance
    )


@check
def first_token_slower_by_percent() -> Outcome:
    printed = text(PAPER, "6.3", "TTFT from 1 to 50 users, increase in per cent")
    return equals(printed, 100 * (ms(8, FIRST, 50) / ms(8, FIRST, 1) - 1), unit="%")


@check
def throughput_falls_346_times() -> Outcome:
    printed = text(PAPER, "6.3", "throughput from 1 to 50 users, decrease")
    ratio = ms(8, STREAM, 50) / ms(8, STREAM, 1)
    cut = 0 <= ratio - printed.value < 0.01
    verdict = ROUNDING if cut else CONTRADICTED
    return Outcome(verdict, f"{ratio:.3f} times longer streaming", "cut to the digits printed")


@check
def throughput_decreases_with_load() -> Outcome:
    ratio = 50 * ms(8, TOTAL, 1) / ms(8, TOTAL, 50)
    found = f"one user's falls; the deployment's rises {ratio:.1f}-fold from 1 to 50 users"
    return Outcome(OVERSTATED if ratio > 1 else HOLDS, found)


@check
def throughput_formula() -> Outcome:
    by_formula = ms(8, STREAM, 1) / TOKENS_OUT
    low, high = (text(PAPER, "6.3", f"throughput, {w}").value for w in ("lowest", "highest"))
    found = f"streaming time over tokens gives {by_formula:.1f} ms a token, no tokens a second"
    return holds_if(low <= by_formula <= high, found)


@check
def first_token_level_with_adapters() -> Outcome:
    cases = {}
    for users in USERS:
        ratio = ms(9, FIRST, users) / ms(8, FIRST, users)
        cases[f"{users} users ({ratio - 1:+.0%})"] = abs(ratio - 1) <= 0.05
    outcome = all_of(cases, "loads within 5 %")
    return Outcome(outcome.verdict, outcome.found, "5 %")


@check
def throughput_level_with_adapters() -> Outcome:
    cases = {}
    for users in USERS:
        ratio = ms(9, STREAM, users) / ms(8, STREAM, users)
        cases[f"{users} users ({ratio - 1:+.0%})"] = abs(ratio - 1) <= 0.05
    outcome = some_of(cases, "loads within 5 %")
    return Outcome(outcome.verdict, outcome.found, "5 %")


@check
def lora_overhead_is_negligible() -> Outcome:
    cases = {}
    for users in USERS:
        ratio = ms(9, TOTAL, users) / ms(8, TOTAL, users)
        cases[f"{users} users ({ratio - 1:+.1%})"] = ratio <= 1.05
    outcome = some_of(cases, "loads whose total time grows by at most 5 %")
    return Outcome(outcome.verdict, outcome.found, "5 %")


@check
def switching_is_overshadowed() -> Outcome:
    extra = max(ms(9, FIRST, u) - ms(8, FIRST, u) for u in USERS)
    least = min(ms(9, STREAM, u) for u in USERS)
    return holds_if(
        extra < least / 5,
        f"at most {extra:.0f} ms more to the first token, {least:.0f} ms of streaming",
    )


@check
def largest_gap_of_first_token() -> Outcome:
    gaps = {(t, u): ms(t, FIRST, u, "p90") / ms(t, FIRST, u) for t in (8, 9) for u in USERS}
    worst = max(gaps, key=gaps.get)
    return holds_if(worst == (8, 5), f"table {worst[0]}, {worst[1]} users")


@check
def p90_of_largest_gap() -> Outcome:
    return equals(
        text(PAPER, "6.3", "largest gap of TTFT, p90"), ms(8, FIRST, 5, "p90"), unit=" ms"
    )


@check
def percent_of_largest_gap() -> Outcome:
    gap = 100 * (ms(8, FIRST, 5, "p90") / ms(8, FIRST, 5) - 1)
    return equals(text(PAPER, "6.3", "largest gap of TTFT, in per cent"), gap, unit="%")


@check
def first_token_within_200_ms() -> Outcome:
    bound = text(PAPER, "6.3", "bound of TTFT").value
    cases = {
        f"table {t}, {u} users, {which} ({ms(t, FIRST, u, which):g})": ms(t, FIRST, u, which)
        <= bound
        for t in (8, 9)
        for u in USERS
        for which in ("average", "p90")
    }
    return all_of(cases, "times")


@check
def milliseconds_a_token() -> Outcome:
    low, high = (text(PAPER, "6.3", f"time a token, {w}").value for w in ("lowest", "highest"))
    cases = {}
    for t in (8, 9):
        for u in USERS:
            each = ms(t, STREAM, u) / TOKENS_OUT
            cases[f"table {t}, {u} users ({each:.1f})"] = low - 0.5 <= each <= high + 0.1
    return some_of(cases, "loads")


@check
def lowest_throughput() -> Outcome:
    value = 1000 / text(PAPER, "6.3", "time a token, highest").value
    return equals(text(PAPER, "6.3", "throughput, lowest"), value, unit=" tokens/s")


@check
def highest_throughput() -> Outcome:
    value = 1000 / text(PAPER, "6.3", "time a token, lowest").value
    return equals(text(PAPER, "6.3", "throughput, highest"), value, unit=" tokens/s")


@check
def throughput_is_the_deployments() -> Outcome:
    together = 50 * TOKENS_OUT / (ms(8, TOTAL, 50) / 1000)
    high = text(PAPER, "6.3", "throughput, highest").value
    found = f"50 users of 60.5 tokens each get about {together:,.0f} tokens/s together"
    return holds_if(together <= 1.1 * high, found)


@check
def total_is_first_plus_streaming() -> Outcome:
    cases = {}
    for t in (8, 9):
        for u in USERS:
            gap = ms(t, TOTAL, u) - ms(t, FIRST, u) - ms(t, STREAM, u)
            cases[f"table {t}, {u} users ({gap:+.2f} ms)"] = abs(gap) <= 0.5
    outcome = all_of(cases, "averages")
    return Outcome(outcome.verdict, outcome.found, "0.5 ms")


def replicas(what: str, which: str) -> tuple[float, float]:
    row = f"{what} / {which}"
    columns = ("50 Concurrent users, 1 replica", "100 Concurrent users, 2 replicas")
    one, two = (cell(PAPER, "table_10", row, column).value for column in columns)
    return one, two


@check
def one_replica_is_table_9() -> Outcome:
    cases = {}
    for what in (TOTAL, FIRST, STREAM):
        for which in ("average", "p90"):
            cases[f"{what} {which}"] = replicas(what, which)[0] == ms(9, what, 50, which)
    return all_of(cases, "cells")


@check
def replicas_are_stable() -> Outcome:
    cases = {}
    for what in (TOTAL, FIRST, STREAM):
        for which in ("average", "p90"):
            one, two = replicas(what, which)
            cases[f"{what} {which} ({two / one - 1:+.1%})"] = abs(two / one - 1) <= 0.1
    outcome = all_of(cases, "times within a tenth")
    return Outcome(outcome.verdict, outcome.found, "a tenth")


@check
def replicas_scale_linearly() -> Outcome:
    one, two = replicas(TOTAL, "average")
    gain = 2 * one / two  # twice the users in two / one of the time
    outcome = holds_if(
        abs(gain / 2 - 1) <= 0.05, f"two replicas do {gain:.2f} times the work of one"
    )
    return Outcome(outcome.verdict, outcome.found, "5 %; only 1 and 2 replicas were tried")
