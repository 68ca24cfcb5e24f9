"""Rounds as pure rules: who trains on what, what counts and how much, and who may say so.

    samples     which positions of which pass are accepted, being worked on, or next (SampleLedger)
    order       from a position in a pass to the sample that stands there (PassOrder, sample_indices)
    shares      how a round is divided by measured speed (Speed, divide_samples)
    weights     how much each update counts, so that a minority cannot steer (weigh)
    length      how long a round should be (choose_round_length)
    standing    the chain of Commits folded up to its newest (Standing, advance)
    driving     the driver's machine: drive, step(state, event, now_ms) -> (state, effects)
    following   the member's machine: follow, step(state, event, now_ms) -> (state, effects)
    succession  who drives next and from where (may_drive, choose_head, next_term, rebuild)

Invariants:

- A position counts in at most one accepted Contribution of its pass, and a pass that has been left behind misses none.
- The Commits and their Assignments are the whole truth: a driver that has only them stands where the lost one stood.
- What a Commit excludes leaves no trace: nothing that builds on it is accepted, and its member goes back to what it was
  after its last accepted Contribution. Driver and members know by the same rule what an exclusion takes along.
- Members that apply the same Commits hold the same state, and follow one chain, whatever order records arrive in.
- No clock, no randomness, no network, no disk: the same events give the same effects.
"""
