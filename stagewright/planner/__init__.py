"""Planning, pure: documents, cost, schedules, simulation, search. No torch, no web, no I/O at import."""
