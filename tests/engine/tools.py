"""What tests of an engine do to it: run it to its end, look at its invariants, hold back its results."""


def check_invariants(engine):
    """Block tables, slots and positions must not contradict each other."""
    scheduler = engine.scheduler
    scheduler.blocks.check(sequence.table for sequence in scheduler.sequences)
    slots = [sequence.slot for sequence in scheduler.running]
    assert len(set(slots)) == len(slots)
    assert all(slot >= 0 for slot in slots)
    for sequence in scheduler.running:
        assert scheduler.blocks.blocks_for(sequence.computed) <= len(sequence.table)
    assert not any(sequence.table or sequence.slot >= 0 for sequence in scheduler.waiting)


def finish(engine, check=False):
    """Step until idle; all tokens by request id."""
    tokens = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        if check:
            check_invariants(engine)
    return tokens


def generate(engine, prompt, new, **options):
    """One request to its end; its tokens."""
    request = engine.add_request(prompt, new, **options)
    return finish(engine)[request]


class DelayedExecutor:
    """Makes a host executor look asynchronous: results appear only when asked for, as on a GPU."""

    def __init__(self, inner):
        self._inner = inner
        self.asynchronous = True

    def __getattr__(self, name):
        return getattr(self._inner, name)
