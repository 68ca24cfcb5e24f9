"""Shoal for Python users: a job from its file to its report, and a shoal on this machine.

    jobfile      job.yaml -> JobFile: every field a default or an error that names the line
    preparation  JobFile -> token shards and a start state, as blobs
    train        begin a job or go on with one: prepare, find nodes, drive, audit, measure, export
    replay       one node's round, recomputed from a run folder
    local        hub and nodes as processes on loopback
    quickstart   all of it at once, with a node that dies, one that comes late and one that lies

Nothing is imported with the room, so that a command costs only what it uses.
"""
