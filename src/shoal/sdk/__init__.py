"""Shoal for Python users: a job from its file to its report, and a shoal on this machine.

    jobfile      job.yaml -> JobFile: every field a default or an error that names the line
    preparation  JobFile -> token shards and a start state, as blobs
    train        begin a job or go on with one: prepare, find nodes, drive, audit, measure, export
    jobs         the runs of this machine: how each stands and what it costs; stops one
    replay       one node's round, recomputed from a run folder
    own_loop     `shoal.join`: a user's own PyTorch loop as a member of a job; loop_engine computes with it, loop_node
                 links it, loop_script and loop_worker run it for its owner
    places       the user's key, the shoal that runs here, which hubs to ask
    local        hub and nodes as processes on loopback
    quickstart   all of it at once, with a node that dies, one that comes late and one that lies

Nothing is imported with the room, so that a command costs only what it uses.
"""
