"""The engine: what a member computes, and the arithmetic that makes all members arrive at the same state.

    Layout        which tensors there are; they lie one after another, by name, in one flat fp32 buffer
    SharedState   the parameters (and outer momentum) all members agree on; its safetensors bytes name it
    Update        a decoded pseudo-gradient; `updates` turns bytes into one and refuses everything else
    OuterStep     shared state + accepted updates of a Commit -> next shared state, the same bytes everywhere
    PrivateState  a member's optimizer moments, step counter and residual; committed to by hash, opened for replay
    Member        the inner side of a round: start state -> steps -> update, and back again when excluded
    EngineProcess the parent's handle on the child process in which a Member lives

Invariants. Shared state r is a function of shared state r-1 and Commit r alone, computed in binary64 with every
operation rounded once, in the Commit's order. A member's start state, batches and learning rates are functions of
public records and of private state that it committed to, so the same engine repeats any round bit for bit. A member
that is rolled back is the member that never did the round.

Nothing here is imported with the room. `state`, `private`, `updates`, `outer`, `schedule`, `data`, `commands`, `pacing`
and `process` need no torch, so that an agent or a driver can use them without paying for it. What computes does:
`member` and `optimizer` (one member's arithmetic), `member_engine` (with the shared states around it), `engine` and
`language` (for language models), `ranks` (several processes), `worker` (the child process).
"""
