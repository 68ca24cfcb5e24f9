"""Whether work was done as claimed: verdicts on replays, and the choice of what is replayed.

    replay     judge(claimed, recomputed, thresholds) -> Verdict: match, mismatch or not replayable, with the difference
    retention  which private states a member keeps for replays, and which it lets go
    audits     audited(secret, contribution_id, rate), and the rate at which cheating does not pay (rate_needed)

Invariants: a verdict carries the measured difference beside its threshold; what cannot be replayed is never called
honest; who is audited cannot be known before the Contribution is bound.
"""
