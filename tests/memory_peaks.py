"""The peak of tensor memory on the CPU, from the profiler's events: exact, without the allocator's rounding."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call):
    """Bytes of tensors that `call()` has alive at once, at most, beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
