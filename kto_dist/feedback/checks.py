"""Figures against thresholds: what passes, what doesn't, and what to do about it.

In:  the parts of an audit, and the config that made the data.
Out: `Check`s, in the order in which they matter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kto_dist.feedback.agreement import Agreement
from kto_dist.feedback.concentration import MIN_USERS, Users
from kto_dist.feedback.config import MiningConfig
from kto_dist.feedback.content import Lengths, StepCounts
from kto_dist.feedback.drift import Balance, Drift, DriftTest
from kto_dist.feedback.thresholds import AuditConfig
from kto_dist.feedback.votes import CLEANING


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One figure against one threshold of the `audit` section."""

    name: str
    setting: str
    """The key of the audit section that holds the threshold."""
    status: Literal["pass", "warn", "unknown"]
    """`unknown`: the log cannot tell."""
    value: float | None
    threshold: float
    message: str
    remedy: str
    """Empty where it passes; audited.line_of makes one line of both."""


def checks_of(
    *,
    agreement: Agreement,
    users: Users | None,
    balance: Balance,
    drift: Drift,
    lengths: Lengths,
    steps: Sequence[StepCounts],
    config: MiningConfig,
) -> tuple[Check, ...]:
    limits = config.audit
    found = [
        _rows(balance, limits),
        *_agreement(agreement, limits, config),
        *_users(users, limits, config),
        _drift("week", drift.weeks, limits, drift.unit is not None),
        _drift("model version", drift.by_model, limits, bool(drift.models)),
        _deployment(balance, limits),
        _length(lengths, limits),
        _one_length(lengths, limits),
        _cleaned(steps, limits),
    ]
    return tuple(check for check in found if check is not None)


def _check(name: str, setting: str, limits: AuditConfig, value: float, bad: bool, message: str, remedy: str) -> Check:
    return Check(
        name=name,
        setting=setting,
        status="warn" if bad else "pass",
        value=value,
        threshold=getattr(limits, setting),
        message=message,
        remedy=remedy if bad else "",
    )


def _unknown(name: str, setting: str, limits: AuditConfig, message: str, remedy: str) -> Check:
    return Check(
        name=name,
        setting=setting,
        status="unknown",
        value=None,
        threshold=getattr(limits, setting),
        message=message,
        remedy=remedy,
    )


def _rows(balance: Balance, limits: AuditConfig) -> Check:
    least = min(balance.dataset.up, balance.dataset.down)
    return _check(
        "rows",
        "min_rows",
        limits,
        least,
        least < limits.min_rows,
        f"the dataset has {balance.dataset.up:,} thumbs up and {balance.dataset.down:,} thumbs down "
        f"(wanted of each: {limits.min_rows:,})",
        "collect more of the rarer kind, or see which step removed it and loosen that step",
    )


def _agreement(agreement: Agreement, limits: AuditConfig, config: MiningConfig) -> list[Check]:
    if agreement.responses < limits.min_shared or agreement.alpha is None or agreement.noise is None:
        return [
            _unknown(
                "agreement",
                "min_alpha",
                limits,
                f"{agreement.responses:,} responses were judged by several users (wanted: {limits.min_shared:,}), "
                "too few to tell how far the labels can be trusted",
                "have some hundred answers judged by three people each, or show popular answers to several users",
            )
        ]
    alpha, noise = agreement.alpha, agreement.noise
    cause = ""
    without = agreement.alpha_without_critics
    if without is not None and without - alpha.value > 0.05:
        cause = f" (it is {without:.2f} without the users named as heavy downvoters: look at them first)"
    loose = config.agreement.conflicts in ("keep", "soft") or config.agreement.min_margin < 0.3
    stricter = "set agreement.conflicts to majority with min_margin 0.3 or more, " if loose else ""
    return [
        _check(
            "agreement",
            "min_alpha",
            limits,
            alpha.value,
            alpha.value < limits.min_alpha,
            f"users agree with a Krippendorff's alpha of {alpha.value:.2f} (95 %: {alpha.low:.2f} to {alpha.high:.2f}; "
            f"wanted: {limits.min_alpha})",
            f"{stricter}say in the interface what a thumb should judge, and train on answers that several users "
            f"judged{cause}",
        ),
        _check(
            "noise",
            "max_noise",
            limits,
            noise.value,
            noise.value > limits.max_noise,
            f"about {noise.value:.0%} of single votes are wrong (95 %: {noise.low:.0%} to {noise.high:.0%}; "
            f"wanted: at most {limits.max_noise:.0%})",
            "raise agreement.min_votes and collect more votes an answer; with labels this noisy a higher "
            "objective.beta and fewer epochs keep the model from learning the noise",
        ),
    ]


def _users(users: Users | None, limits: AuditConfig, config: MiningConfig) -> list[Check]:
    if users is None:
        return [
            _unknown(
                "user_share",
                "max_user_share",
                limits,
                "the log names no users, so nobody's influence is known or limited",
                "log a user id (its salted hash will do) and map it with columns.user",
            )
        ]
    result = []
    if users.largest_loss_after is not None:
        share, allowed = users.largest_loss_after, limits.max_user_share
        # a twentieth each is as equal as it gets with twenty users, where there are no votes but theirs
        fair = 0.0 if users.votes_without_user else 1 / users.users
        result.append(
            _check(
                "user_share",
                "max_user_share",
                limits,
                share,
                share > allowed,
                f"one user has {share:.1%} of the training loss (wanted: at most {allowed:.0%}"
                + (f"; with {users.users} users an equal share is {fair:.1%})" if fair > allowed / 2 else ")"),
                "set or lower users.max_votes, raise users.volume towards 1, or collect from more users",
            )
        )
    if users.spread_of_rates is None:
        result.append(
            _unknown(
                "critics_share",
                "max_critics_share",
                limits,
                f"fewer than {MIN_USERS} users have {limits.min_votes} votes or more, too few to tell heavy downvoters "
                "from honest differences",
                "collect from more users, or lower audit.min_votes",
            )
        )
    elif users.named_loss_after is not None:
        share = users.named_loss_after
        result.append(
            _check(
                "critics_share",
                "max_critics_share",
                limits,
                share,
                share > limits.max_critics_share,
                f"{users.named:,} heavy downvoter{' holds' if users.named == 1 else 's hold'} {share:.1%} of the "
                f"training loss (wanted: at most {limits.max_critics_share:.0%})",
                "raise users.bias towards 1 and set users.max_votes; where the others overrule most of their "
                "downvotes, leave these users out of the log",
            )
        )
    return result


def _drift(kind: str, test: DriftTest | None, limits: AuditConfig, known: bool) -> Check | None:
    name = f"drift_by_{kind.split()[0]}"
    if test is None:
        if known:
            return None  # one week, or one model version: there is nothing to compare
        column = "columns.time" if kind == "week" else "columns.model"
        return _unknown(
            name, "max_drift", limits, f"the log gives no {kind}, so drift by it is unknown", f"map {column}"
        )
    far, chance = abs(test.largest_gap) > limits.max_drift, test.largest_gap_p >= limits.significance
    where = "the week of " if kind == "week" else "model version "
    message = (
        f"in {where}{test.largest_gap_in} the share of thumbs up lies {abs(test.largest_gap) * 100:.1f} points "
        f"{'above' if test.largest_gap > 0 else 'below'} the rest's (wanted: at most {limits.max_drift * 100:.0f}; "
        f"against chance, p {_p(test.largest_gap_p)} after correction for {test.groups} groups)"
    )
    if far and chance:
        return _unknown(
            name, "max_drift", limits, f"{message}: so few votes may lie as far apart by chance", "collect more votes"
        )
    remedy = "see what changed then (model, interface, audience), and train on the votes since, or on one model version"
    return _check(name, "max_drift", limits, abs(test.largest_gap), far, message, remedy)


def _deployment(balance: Balance, limits: AuditConfig) -> Check | None:
    gap = balance.deployment_gap
    if gap is None:
        return None
    return _check(
        "deployment",
        "max_deployment_gap",
        limits,
        abs(gap),
        abs(gap) > limits.max_deployment_gap,
        f"{balance.dataset.up_share:.0%} of the dataset's rows are thumbs up, and deployment expects "
        f"{balance.deployment_up_share:.0%} (wanted: at most {limits.max_deployment_gap * 100:.0f} points apart)",
        f"set balance.target_up_share to {balance.deployment_up_share}",
    )


def _length(lengths: Lengths, limits: AuditConfig) -> Check | None:
    if lengths.auc is None:
        return None
    strength = max(lengths.auc, 1 - lengths.auc)
    longer = "up" if lengths.auc > 0.5 else "down"
    return _check(
        "length",
        "max_length_auc",
        limits,
        strength,
        strength > limits.max_length_auc,
        f"thumbs-{longer} answers are the longer ones {100 * strength:.3g}% of the time (wanted: at most "
        f"{100 * limits.max_length_auc:.3g}%)",
        "the model may learn length in place of quality: unless length is what users want, bound it with "
        "clean.min_characters and clean.max_characters",
    )


def _one_length(lengths: Lengths, limits: AuditConfig) -> Check | None:
    pile = lengths.pile
    if lengths.auc is None and pile is None:
        return None
    if pile is None:
        return _check(
            "one_length", "max_one_length", limits, 0.0, False, "answers of one exact length do not pile up", ""
        )
    ending = f", and most end with {pile.ending!r}" if pile.ending else ""
    cut = pile.characters - len(pile.ending)
    pattern = rf"(?s)^.{{{cut}}}{re.escape(pile.ending)}$"
    return _check(
        "one_length",
        "max_one_length",
        limits,
        pile.share,
        pile.share > limits.max_one_length,
        f"{pile.answers:,} answers ({pile.share:.1%}) have exactly {pile.characters:,} characters and differ in text"
        f"{ending} (wanted: at most {limits.max_one_length:.0%})",
        f"the export may have cut them: export whole answers, or leave them out with clean.truncated: ['{pattern}']"
        if cut <= 1000
        else "the export may have cut them: export whole answers, or leave them out "
        f"with clean.max_characters: {pile.characters - 1}",
    )


def _cleaned(steps: Sequence[StepCounts], limits: AuditConfig) -> Check | None:
    """Of the steps that look at votes and answers; what users' caps and sampling take is asked for."""
    labelled = next((step.up_before + step.down_before for step in steps if step.step == "no_label"), 0)
    if not labelled:
        return None
    taken = {step.step: step.up_removed + step.down_removed for step in steps if step.step in CLEANING}
    share = sum(taken.values()) / labelled
    most = sorted(taken.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{name.replace('_', ' ')} {votes:,}" for name, votes in most if votes)
    return _check(
        "cleaned",
        "max_cleaned",
        limits,
        share,
        share > limits.max_cleaned,
        f"the cleaning takes {share:.0%} of {labelled:,} labelled votes"
        + (f", most of them by {listed}" if listed else "")
        + f" (wanted: at most {limits.max_cleaned:.0%})",
        "see in the report what these steps took, and loosen those that take good answers; many exact duplicates may "
        "mean that a log was given twice",
    )


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-12 else "below 1e-12"
