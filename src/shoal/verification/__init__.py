"""Whether work was done as claimed: verdicts on replays, and the choice of what is replayed."""
