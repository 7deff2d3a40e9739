from stagewright.planner.schedules.action import Action, Kind
from stagewright.planner.schedules.schedule import Schedule, encode

DUR = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0}


def lower(schedule: Schedule) -> Schedule:
    D = schedule.num_ranks
    lists = [[a for step in schedule.actions(r) for a in step] for r in range(D)]
    out = [[] for _ in range(D)]
    pos = [0] * D
    clock = [0.0] * D
    done = {}
    place = schedule.placement
    preds = {s: [a for a, b in schedule.edges if b == s] for s in range(schedule.num_stages)}
    succs = {s: [b for a, b in schedule.edges if a == s] for s in range(schedule.num_stages)}

    def needs(a):
        if a.kind is Kind.F:
            return [(Kind.F, a.replica, p, a.microbatch, a.slice) for p in preds[a.stage]]
        if a.kind in (Kind.B, Kind.I):
            return [(Kind.F, a.replica, a.stage, a.microbatch, a.slice)] + [
                ("G", a.replica, s, a.microbatch, a.slice) for s in succs[a.stage]
            ]
        return []

    while any(pos[r] < len(lists[r]) for r in range(D)):
        best = None
        for r in range(D):
            if pos[r] < len(lists[r]):
                a = lists[r][pos[r]]
                n = needs(a)
                if all(k in done for k in n):
                    t = max([clock[r]] + [done[k] for k in n])
                    if best is None or t + DUR[a.kind] < best[0]:
                        best = (t + DUR[a.kind], r, a)
        assert best, "deadlock"
        end, r, a = best
        pos[r] += 1
        clock[r] = end
        out[r].append(a)
        unit = (a.replica, a.stage, a.microbatch, a.slice)
        if a.kind is Kind.F:
            done[(Kind.F, *unit)] = end
            for s in succs[a.stage]:
                peer = place[a.replica, s]
                if peer != r:
                    out[r].append(Action(Kind.SEND_F, a.stage, a.microbatch, a.slice, a.replica))
                    out[peer].append(Action(Kind.RECV_F, s, a.microbatch, a.slice, a.replica))
        elif a.kind in (Kind.B, Kind.I):
            done[("G", *unit)] = end
            for s in preds[a.stage]:
                peer = place[a.replica, s]
                if peer != r:
                    out[r].append(Action(Kind.SEND_B, a.stage, a.microbatch, a.slice, a.replica))
                    out[peer].append(Action(Kind.RECV_B, s, a.microbatch, a.slice, a.replica))
    for r in range(D):
        held = sorted(
            {(int(k), int(s)) for k in range(place.shape[0]) for s in range(place.shape[1]) if place[k, s] == r},
            key=lambda x: (x[1], x[0]),
        )
        for k, s in held:
            out[r].append(Action(Kind.REDUCE_GRAD, s, replica=k))
        for k, s in held:
            out[r].append(Action(Kind.OPT, s, replica=k))
    from dataclasses import replace

    return replace(schedule, orders=tuple(encode(o) for o in out))
