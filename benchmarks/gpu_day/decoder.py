"""A Llama of few layers, at Llama-3-8B's sizes: are its CUDA graphs right, and how fast is it?"""

import inspect
import sys
import time
from collections.abc import Callable
from typing import Any

from gpu_day.process import Run
from gpu_day.rehearsal import compiles

_OUTLIERS = (3, 17, 41)  # channels of each norm
_AMPLIFIED = 12.0
_LINEARS = 7  # of a layer
_SEEDS = range(4)
WHO = ("bf16", "column", "token")


def llama(run: Run, depth: int) -> Any:
    """Random weights in bf16, and norms that make outliers."""
    import transformers

    torch = run.place.torch()
    config = transformers.LlamaConfig(
        **run.place.llama,
        num_hidden_layers=depth,
        max_position_embeddings=2 * run.place.capacity,
        attn_implementation="eager" if run.rehearses else "sdpa",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[list(_OUTLIERS)] = _AMPLIFIED
    return model


def _compiled(torch: Any, model: Any, who: str, replays: bool) -> Any:
    """Under Inductor in bf16, or under llmint8 with a decomposition."""
    import int8fx  # noqa: F401, which registers the backend

    inductor = {"triton.cudagraphs": replays}
    if who == "bf16":
        return torch.compile(model, options=inductor, dynamic=False)
    options = {"decomposition": who, "inductor": inductor}
    return torch.compile(model, backend="llmint8", options=options, dynamic=False)


def graphs(run: Run) -> None:
    """Two layers, as they are and replayed as CUDA graphs, on inputs with other outliers."""
    torch, place = run.place.torch(), run.place
    model = llama(run, place.depths[1])
    prompts = _prompts(torch, place)
    with torch.no_grad():
        exact = {key: _logits(model, ids) for key, ids in prompts.items()}
        plain, first = _graphs_of(run, model, prompts, replays=False)
        replayed, second = plain, first
        if not run.rehearses:
            replayed, second = _graphs_of(run, model, prompts, replays=True)
    differ = [key for key in prompts if not torch.equal(plain[key], replayed[key])]
    error = max(float((plain[k] - exact[k]).norm() / exact[k].norm()) for k in prompts)
    ok = not differ and first and second and error < 1
    run.say(ok=ok, differ=differ, relative_error=error, prompts=len(prompts))
    sys.exit(not ok)


def _prompts(torch: Any, place: Any) -> dict[str, Any]:
    def drawn(length: int, seed: int) -> Any:
        generator = torch.Generator(place.device).manual_seed(seed)
        return torch.randint(0, place.llama["vocab_size"], (1, length), generator=generator)

    return {
        f"{length} tokens, {seed}": drawn(length, seed) for length in place.lengths for seed in _SEEDS
    }


def _logits(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, use_cache=False).logits.float().clone()


def _graphs_of(
    run: Run, model: Any, prompts: dict[str, Any], replays: bool
) -> tuple[dict[str, Any], bool]:
    """Logits of each prompt, the second time that it is given; whether all was as it should be."""
    import torch
    from torch._dynamo.utils import counters

    import int8fx

    torch._dynamo.reset()
    counters.clear()
    began = time.monotonic()
    with int8fx.collect_reports() as reports, compiles(run.rehearses):
        call = _compiled(torch, model, "column", replays)
        for ids in prompts.values():
            _logits(call, ids)
        found = {key: _logits(call, ids) for key, ids in prompts.items()}
    accepted = [len(report.accepted) for report in reports]
    skips = counters["inductor"]["cudagraph_skips"]
    expected = _LINEARS * run.place.depths[1]
    ok = skips == 0 and all(count == expected for count in accepted)
    ok = ok and all(bool(logits.isfinite().all()) for logits in found.values())
    seconds = round(time.monotonic() - began, 1)
    run.say(ok=ok, replays=replays, accepted=accepted, skips=skips, seconds=seconds)
    return found, ok


def decoder(run: Run) -> None:
    """Prefill and decode, with the most memory that they take."""
    torch, faults = run.place.torch(), 0
    for who in WHO[1:2] if run.rehearses else WHO:
        torch._dynamo.reset()
        began = time.monotonic()
        try:
            us = {phase: _timed(run, call) for phase, call in calls(run, who).items()}
        except Exception as error:
            faults += 1
            run.say(ok=False, who=who, error=f"{type(error).__name__}: {error}"[:300])
            continue
        seconds = round(time.monotonic() - began, 1)
        run.say(who=who, us=us, peak_GiB=_peak(torch, run.place), seconds=seconds)
    sys.exit(faults > 0)


def calls(run: Run, who: str) -> dict[str, Callable[[], Any]]:
    """A prefill, and a step of decode for each batch, of a new model."""
    place, torch = run.place, run.place.torch()
    model = llama(run, place.depths[0])
    step = _compiled(torch, model, who, replays=not run.rehearses)
    prompt = torch.zeros(1, place.prompt, dtype=torch.int64)
    made = {"prefill": lambda: step(input_ids=prompt, use_cache=False, logits_to_keep=1)}
    with torch.no_grad():
        made |= {f"decode {batch}": _decode_step(run, model, step, batch) for batch in place.batches}

    def within(call: Callable[[], Any]) -> Callable[[], Any]:
        def run_() -> Any:
            with torch.no_grad(), compiles(run.rehearses):
                return call()

        return run_

    return {phase: within(call) for phase, call in made.items()}


def _timed(run: Run, call: Callable[[], Any]) -> float:
    for _ in range(1 if run.rehearses else 3):  # compiles, and records
        call()
    return run.place.microseconds(call, 150)


def _decode_step(run: Run, model: Any, call: Any, batch: int) -> Callable[[], Any]:
    """One token a sequence, behind half a prompt; each call is a step."""
    import torch
    import transformers

    parameters = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in parameters else "past_key_values"
    cache = transformers.StaticCache(config=model.config, max_cache_len=run.place.capacity)
    before = torch.zeros(batch, run.place.prompt // 2, dtype=torch.int64)
    model(input_ids=before, use_cache=True, logits_to_keep=1, **{argument: cache})
    token = torch.zeros(batch, 1, dtype=torch.int64)
    return lambda: call(input_ids=token, use_cache=True, **{argument: cache})


def _peak(torch: Any, place: Any) -> float | None:
    if place.rehearses:
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)
