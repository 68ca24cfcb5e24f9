"""Rounds as pure rules: who trains on what, what counts and how much, and who may say so."""
