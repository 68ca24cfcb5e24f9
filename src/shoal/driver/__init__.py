"""The driver of a job: wiring around `rounds.driving`, and the folder in which a run is recorded.

    gang          finding nodes that fit, and linking to them
    training      carries out what the rules decide, and tells them what happens
    members       a line to each member: Turns in order, lost links taken up again or given up
    audit         replays contributions while the job runs; `replay` is how one is replayed, at any time
    takeover      a driver that died starts again from the chain of Commits, in a new term
    folder        the run folder: every signed record, lines of metrics, lanes and events; survives a kill
    signers       whose word each record in a folder has to be: owner, driver of a term, node of a member
    account, report, report_page   who did what, as numbers and as one page that needs no network

Invariants. A Commit is on disk before anyone hears of it. What is in a report follows from the folder alone. The driver
decides order and membership through the rules, never by itself; what a member says is verified before it counts.
"""
