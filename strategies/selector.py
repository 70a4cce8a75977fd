"""Which plan is carried out: pure, from the workload, the hardware and an estimator."""

from __future__ import annotations

from dataclasses import replace

from strategies.base import Estimator, Strategy
from strategies.contracts import Hardware, Plan, Rejection, Workload
from strategies.errors import NoStrategyFits, ParallelTuneError
from strategies.fit import shortfall_lines
from strategies.registry import StrategyRegistry

AUTO = "auto"


def select(
    workload: Workload, hardware: Hardware, estimate: Estimator, registry: StrategyRegistry, strategy: str = AUTO
) -> Plan:
    """The plan to carry out.

    `auto` asks the strategies in their order and takes the first that fits. A strategy named by the user is honoured
    or refused, never swapped. `rejected` says why the others were not taken.

    Raises:
        NoStrategyFits: nothing fits, or not the strategy that was named; says by how much on each device.
        ConfigError: there is no such strategy, or the workload contradicts itself.
    """
    plan = closest_plan(workload, hardware, estimate, registry, strategy)
    if not plan.fits:
        raise no_strategy_fits(plan, strategy)
    return plan


def closest_plan(
    workload: Workload, hardware: Hardware, estimate: Estimator, registry: StrategyRegistry, strategy: str = AUTO
) -> Plan:
    """What `select` answers; where that would refuse, the plan that comes closest, with `fits` False.

    Raises:
        ConfigError: there is no such strategy, or the workload contradicts itself.
    """
    asked = registry.in_auto_order() if strategy == AUTO else (registry.get(strategy),)
    if not asked:
        registry.get(strategy)  # says that nothing is registered
    plans: list[Plan] = []
    for candidate in asked:
        plans.append(candidate.plan(workload, hardware, estimate))
        if plans[-1].fits:
            break
    chosen = plans[-1] if plans[-1].fits else min(plans, key=_total_shortfall)
    rejected = [_rejection(plan, chosen) for plan in plans if plan is not chosen]
    planned = {plan.strategy for plan in plans}
    for other in registry.in_auto_order():
        if other.name not in planned:
            rejected.append(_other(other, chosen, workload, hardware, estimate, auto=strategy == AUTO))
    return replace(chosen, rejected=tuple(rejected))


def no_strategy_fits(plan: Plan, strategy: str = AUTO) -> NoStrategyFits:
    """The refusal of a plan that does not fit: the shortfall of each device, and which strategy would fit."""
    short = "; ".join(shortfall_lines(plan.devices)) or (plan.reasons[0] if plan.reasons else "it does not fit")
    would = [r.strategy for r in plan.rejected if r.reason.startswith(WOULD_FIT)]
    if strategy == AUTO:
        return NoStrategyFits(f"no strategy fits. Closest is {plan.strategy}: {short}.", SHOW_PLAN)
    if would:
        hint = f"{would[0]} would fit: --strategy {would[0]}, or --strategy auto."
        return NoStrategyFits(f"{strategy} does not fit: {short}.", hint)
    return NoStrategyFits(f"{strategy} does not fit, nor does another strategy: {short}.", SHOW_PLAN)


SHOW_PLAN = "`parallel-tune plan` with the same options shows what fills each device."

WOULD_FIT = "would fit"
"""How the reason of a rejected strategy begins that could have been taken."""


def _total_shortfall(plan: Plan) -> float:
    # Relative to what each device has, so that a plan over many cards is not worse for being over many.
    return max(device.memory.needed_bytes / max(1, device.free_bytes) for device in plan.devices)


def _rejection(plan: Plan, chosen: Plan, auto: bool = True) -> Rejection:
    first = plan.reasons[0] if plan.reasons else "it gives no reason"
    if not plan.fits:
        return Rejection(plan.strategy, f"does not fit: {first}")
    speed = f"{plan.predicted_tokens_per_second:,.0f} tokens/s"
    if not chosen.fits:
        return Rejection(plan.strategy, f"{WOULD_FIT}, {speed} predicted: {first}")
    why = f"auto takes {chosen.strategy} first" if auto else f"{chosen.strategy} was asked for"
    against = f"{speed} predicted against {chosen.predicted_tokens_per_second:,.0f}"
    return Rejection(plan.strategy, f"{WOULD_FIT}, {against}; {why}")


def _other(
    strategy: Strategy, chosen: Plan, workload: Workload, hardware: Hardware, estimate: Estimator, auto: bool
) -> Rejection:
    try:
        return _rejection(strategy.plan(workload, hardware, estimate), chosen, auto)
    except ParallelTuneError as error:
        return Rejection(strategy.name, f"cannot plan this: {error.message}")
    except Exception as error:  # nobody asked for it: another package's fault must not stop the run
        return Rejection(strategy.name, f"failed to plan: {type(error).__name__}: {error}")
