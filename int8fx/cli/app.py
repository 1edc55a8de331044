"""The command ``int8fx``.

Heavy imports (torch, transformers) are inside the commands, so that ``--help`` answers at once.
"""

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from int8fx.bench.models import check_name
from int8fx.cli.arguments import (
    FAILED,
    INTERRUPTED,
    CalibrationOption,
    DebugOption,
    DecompositionOption,
    JsonOption,
    OnlyOption,
    RuleOption,
    SchemeOption,
    SkipOption,
    ThresholdOption,
    above_zero,
    absent,
    backend_options,
    complain,
    numbers,
    one_line_errors,
    positive,
    print_json,
    writable,
)
from int8fx.errors import QUANTISED, UserError

app = typer.Typer(help="LLM.int8() inside torch.compile.", no_args_is_help=True, add_completion=False)

BATCH = 128  # tokens that calibrate runs at once

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A causal language model: a directory, a .gguf file, or a hub name. "
        "Without it, SmolLM2-135M-Instruct is fetched once (93 MB; 640 MB in the cache).",
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="UTF-8 text to run on; without it, the novel that ships here."),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; every error is one line on stderr, and the exit code is not 0."""
    try:
        return app(args=arguments, prog_name="int8fx", standalone_mode=False) or 0
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # The parser's own errors. Their base class has moved between typer's releases; this
        # method is what they have in common.
        if not hasattr(error, "format_message"):
            raise
        # It is empty when the help was shown instead.
        message = error.format_message().removesuffix(".")
        code = getattr(error, "exit_code", FAILED)
        return complain(f"{message}; see --help", code) if message else code


def _print_version(asked: bool) -> None:
    if asked:
        print(f"int8fx {importlib.metadata.version('int8fx')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
@one_line_errors
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A causal language model: a directory, a .gguf file, or a hub name. "
            "Without it, SmolLM2-135M-Instruct is fetched once (93 MB; 640 MB in the cache).",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="What to generate from.")
    ] = "Why is the sky blue? Answer in two sentences.",
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many to generate, at most.")
    ] = 64,
    windows: Annotated[
        int,
        typer.Option(
            parser=positive,
            metavar="N",
            help="How many windows of 512 tokens to judge the accuracy on, at most.",
        ),
    ] = 10,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Sets a model as loaded, Inductor in bf16, and llmint8 on both side by side, in one table.

    Most of the time goes into compiling, which the next run finds in Inductor's cache.
    """
    progress = Console(stderr=True)
    check_name(model)
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx.cli.demo import Settings, run

    outcome = run(Settings(model, prompt, tokens, windows), progress)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
def bench(
    model: ModelArgument = None,
    shape: Annotated[str, typer.Option(metavar="KxN", help="Of the linear.")] = "4096x4096",
    rows: Annotated[str, typer.Option(metavar="M,...", help="Rows of its input.")] = "1,16,512",
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Of llmint8's linears; may be repeated (llm.int8, w8a16)."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Of measuring, for each linear and contender.")
    ] = 1.0,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="Of the model's prefill.")
    ] = 512,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Times single linears, and a model's prefill and decode, beside Inductor in bf16."""
    progress = Console(stderr=True)
    K, N = numbers("--shape", shape, "x", 2)
    sizes = numbers("--rows", rows, ",")
    above_zero("--seconds", seconds)
    check_name(model)
    schemes = scheme or ["llm.int8", "w8a16"]
    for name in schemes:
        backend_options(scheme=name)
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx.bench import smollm2
        from int8fx.bench.texts import load_with_tokens
        from int8fx.cli.bench import Settings
        from int8fx.cli.bench import bench as run

    loaded, token_ids = load_with_tokens(model, None, progress)
    settings = Settings(K, N, sizes, schemes, seconds, tokens)
    outcome = run(loaded, token_ids[None], model or smollm2.CONVERTED, settings, progress)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
def evaluate(
    model: ModelArgument = None,
    text: TextOption = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,SETTING=VALUE...]",
            help="What to compare with float, as llm.int8,threshold=3; may be repeated. All schemes.",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many windows of the text to judge.")
    ] = 20,
    length: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens a window has.")
    ] = 512,
    inject: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR", help="A second table, with six channels of every norm amplified so much."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the injected channels.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Through Inductor: minutes for each scheme.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compares schemes with the float model: perplexity, KL divergence, top-1 agreement."""
    progress = Console(stderr=True)
    above_zero("--inject", inject)
    check_name(model)
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx import SCHEMES
        from int8fx.analysis.evaluate import Settings, contender
        from int8fx.analysis.evaluate import evaluate as run
        from int8fx.bench import smollm2
        from int8fx.bench.texts import load_with_tokens

    contenders = {spec: contender(spec) for spec in scheme or SCHEMES}
    loaded, token_ids = load_with_tokens(model, text, progress)
    settings = Settings(contenders, windows, length, inject, seed, compiled)
    outcome = run(loaded, token_ids, settings, model or smollm2.CONVERTED, progress)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
def explain(
    model: ModelArgument = None,
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens of the text to run on.")
    ] = 256,
    threshold: ThresholdOption = None,
    decomposition: DecompositionOption = None,
    scheme: SchemeOption = None,
    calibration: CalibrationOption = None,
    rule: RuleOption = None,
    skip: SkipOption = None,
    only: OnlyOption = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the pictures (.png, .svg, .pdf).")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Shows every linear of a model: what became of it, its outliers, what int8 costs it."""
    progress = Console(stderr=True)
    writable("--html", html)
    writable("--plot", plot)
    check_name(model)
    options = backend_options(
        threshold=threshold,
        decomposition=decomposition,
        scheme=scheme,
        calibration=calibration,
        rules=rule,
        skip=skip,
        only=only,
    )
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx import explain
        from int8fx.analysis.explanation.plots import require_matplotlib
        from int8fx.bench.texts import load_with_tokens

    if html or plot:
        require_matplotlib()
    loaded, token_ids = load_with_tokens(model, text, progress, int8=True)
    with step(progress, "Running the model, observed"):
        shown = explain(loaded, input_ids=token_ids[None, :tokens], use_cache=False, options=options)
    for path, write in ((html, shown.to_html), (plot, shown.plot)):
        if path is not None:
            write(path)
    print_json(shown.to_dict()) if json else Console().print(shown)


@app.command()
@one_line_errors
def calibrate(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path(
        "calibration.json"
    ),
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens of the text to run on.")
    ] = 512,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Finds which columns of each linear's input are largest: what int8-rotated keeps in 16-bit.

    A few tokens are enough, of any text. The file is for --calibration, and for
    options={"scheme": "int8-rotated", "calibration": FILE}
    """
    progress = Console(stderr=True)
    writable("--out", out)
    check_name(model)
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx import calibrate as run
        from int8fx.bench.texts import load_with_tokens

    loaded, token_ids = load_with_tokens(model, text, progress, int8=True)
    # Some at a time, so that the bar moves.
    parts = token_ids[:tokens].tensor_split(max(1, min(tokens, len(token_ids)) // BATCH))
    batches = [{"input_ids": part[None], "use_cache": False} for part in parts]
    with step(progress, "Running the model, observed", len(batches)) as update:
        calibration = run(loaded, batches, on_batch=update)
    calibration.save(out)
    wrote = {"file": str(out), "linears": len(calibration.linears), "rows": calibration.rows}
    shown = "{linears} linears over {rows} tokens: {file}".format(**wrote)
    print_json(wrote) if json else Console().print(shown, soft_wrap=True)


@app.command()
@one_line_errors
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    scheme: SchemeOption = None,
    calibration: CalibrationOption = None,
    threshold: ThresholdOption = None,
    decomposition: DecompositionOption = None,
    skip: SkipOption = None,
    only: OnlyOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Writes a model with its weights in int8, as from_pretrained reads it back.

    Afterwards, where int8fx is installed:  AutoModelForCausalLM.from_pretrained(OUT)
    """
    progress = Console(stderr=True)
    options = backend_options(
        scheme=scheme,
        calibration=calibration,
        threshold=threshold,
        decomposition=decomposition,
        skip=skip,
        only=only,
    )
    absent("OUT", out)
    if model.endswith(".gguf"):
        raise UserError(f"MODEL {model}{QUANTISED}")
    check_name(model)
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx.cli.quantize import quantize_files

    saved = quantize_files(model, out, options, progress)
    print_json(saved.to_dict()) if json else Console().print(saved)


@app.command()
@one_line_errors
def suggest(
    model: ModelArgument = None,
    text: TextOption = None,
    kl: Annotated[
        float | None, typer.Option(metavar="NATS", help="Budget: mean KL divergence from float.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="MIB", help="Budget: of all parameters and buffers.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens of the text to run on.")
    ] = 256,
    calibration: CalibrationOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measures what each linear costs in accuracy, and proposes options that keep a budget.

    With --kl the fastest that keep it, with --memory the most accurate. int8-rotated is tried with the
    columns of --calibration, or else of the text's tokens.
    """
    progress = Console(stderr=True)
    above_zero("--kl", kl)
    above_zero("--memory", memory)
    check_name(model)
    budgets = {"kl": kl, "memory": None if memory is None else memory * 2**20}
    budget = {name: value for name, value in budgets.items() if value is not None}
    if len(budget) != 1:
        raise UserError("a budget is needed: one of --kl NATS and --memory MIB")
    from int8fx.bench.progress import step

    with step(progress, "Importing torch and transformers"):
        from int8fx import suggest as run
        from int8fx.bench.texts import load_with_tokens

    loaded, token_ids = load_with_tokens(model, text, progress)
    inputs = {"input_ids": token_ids[None, :tokens], "use_cache": False}
    with step(progress, "Measuring each linear, then mixtures", counted=True) as on_run:
        suggestion = run(loaded, inputs, budget=budget, calibration=calibration, on_run=on_run)
    print_json(suggestion.to_dict()) if json else Console().print(suggestion)
