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
from int8fx.bench.progress import import_libraries, step
from int8fx.cli.arguments import (
    FAILED,
    INTERRUPTED,
    DebugOption,
    JsonOption,
    above_zero,
    absent,
    complain,
    ending,
    exists,
    number,
    numbers,
    one_line_errors,
    positive,
    print_json,
    whole,
    writable,
)
from int8fx.cli.asked import Asked, takes_options
from int8fx.cli.help import App
from int8fx.cli.method import (
    NEAREST,
    TOKENS,
    MethodOption,
    MethodsOption,
    MethodTextOption,
    MethodTokensOption,
    check_text,
    chosen,
    schemes_of,
)
from int8fx.errors import QUANTISED, UserError

app = App(help="LLM.int8() inside torch.compile.", no_args_is_help=True)

PICTURES = (".png", ".svg", ".pdf")
BATCH = 128  # tokens that calibrate runs at once

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
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
@takes_options
def demo(
    model: ModelArgument = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What to generate from.")
    ] = "What is the capital of France?",
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
    *,
    asked: Asked,
) -> None:
    """Sets a model as loaded, Inductor in bf16, and llmint8 on both side by side, in one table.

    Most of the time goes into compiling, which the next run finds in Inductor's cache.
    """
    progress = Console(stderr=True)
    check_name(model)
    options = asked.options()
    import_libraries(progress)
    from int8fx.cli.demo import Settings, run

    outcome = run(Settings(model, prompt, tokens, windows, options), progress)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
@takes_options
def bench(
    model: ModelArgument = None,
    shape: Annotated[str, typer.Option(metavar="KxN", help="Of the linear.")] = "4096x4096",
    rows: Annotated[str, typer.Option(metavar="M,...", help="Rows of its input.")] = "1,16,512",
    seconds: Annotated[
        float,
        typer.Option(parser=number, metavar="S", help="Of measuring, for each linear and contender."),
    ] = 1.0,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="Of the model's prefill.")
    ] = 512,
    no_model: Annotated[bool, typer.Option("--no-model", help="Single linears alone.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Times single linears, and a model's prefill and decode, beside Inductor in bf16.

    Each --scheme is timed on linears, by default llm.int8 and w8a16. The model runs in the first.
    """
    progress = Console(stderr=True)
    K, N = numbers("--shape", shape, "x", 2)
    sizes = numbers("--rows", rows, ",")
    above_zero("--seconds", seconds)
    check_name(model)
    if no_model and model is not None:
        raise UserError(f"MODEL {model} and --no-model contradict each other; give one")
    contenders = asked.contenders(["llm.int8", "w8a16"])
    import_libraries(progress)
    from int8fx.bench import smollm2
    from int8fx.bench.texts import load_with_tokens
    from int8fx.cli.bench import Settings
    from int8fx.cli.bench import bench as run

    settings = Settings(K, N, sizes, contenders, seconds, tokens)
    if no_model:
        outcome = run(settings, progress)
    else:
        loaded, token_ids = load_with_tokens(model, None, progress)
        outcome = run(settings, progress, loaded, token_ids[None], model or smollm2.CONVERTED)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
@takes_options
def evaluate(
    model: ModelArgument = None,
    text: TextOption = None,
    windows: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many windows of the text to judge.")
    ] = 20,
    length: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens a window has.")
    ] = 512,
    inject: Annotated[
        float | None,
        typer.Option(
            parser=number,
            metavar="FACTOR",
            help="A second table, with six channels of every norm amplified so much.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(parser=whole, metavar="N", help="Of the injected channels.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Through Inductor: minutes for each scheme.")
    ] = False,
    method: MethodsOption = None,
    method_text: MethodTextOption = None,
    method_tokens: MethodTokensOption = TOKENS,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Compares schemes with the float model: perplexity, KL divergence, top-1 agreement.

    Each --scheme is a line of the table; without one, every scheme that there is. With --options the
    options in the file are. With --method there is a line for each scheme and method. gptq and awq see
    --method-text, which is not the text that is judged.
    """
    progress = Console(stderr=True)
    above_zero("--inject", inject)
    check_name(model)
    methods = method or [NEAREST]
    check_text(methods, method_text)
    algorithm = next((name for name in methods if name != NEAREST), None)
    if inject is not None and algorithm:
        raise UserError(f"--inject {inject:g} changes weights that --method {algorithm} has quantised")
    if method_text is not None and text is not None and method_text.resolve() == text.resolve():
        raise UserError(f"--method-text {method_text} is the text that is judged; give another")
    served = [name for name in schemes_of(NEAREST) if all(name in schemes_of(each) for each in methods)]
    contenders = asked.contenders(served)
    algorithms = {
        f"{name}, {each}": chosen(each, options, method_text, method_tokens, needs_text=True)
        for name, options in contenders.items()
        for each in methods
        if each != NEAREST
    }
    if NEAREST not in methods:
        contenders = {}
    import_libraries(progress)
    from int8fx.analysis.evaluate import Settings
    from int8fx.analysis.evaluate import evaluate as run
    from int8fx.bench import smollm2
    from int8fx.bench.texts import load_with_text
    from int8fx.cli.evaluate import by_algorithms

    loaded, tokenizer, token_ids = load_with_text(model, text, progress)
    others = by_algorithms(loaded, tokenizer, algorithms, compiled, progress)
    settings = Settings(contenders, windows, length, inject, seed, compiled, others)
    outcome = run(loaded, token_ids, settings, model or smollm2.CONVERTED, progress)
    print_json(outcome.to_dict()) if json else Console().print(outcome)


@app.command()
@one_line_errors
@takes_options
def explain(
    model: ModelArgument = None,
    text: TextOption = None,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens of the text to run on.")
    ] = 256,
    summary: Annotated[bool, typer.Option("--summary", help="Without a line for each linear.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page (.html).")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the pictures (.png, .svg, .pdf).")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Shows every linear of a model: what became of it, its outliers, what int8 costs it."""
    progress = Console(stderr=True)
    ending("--html", html, ".html", ".htm")
    ending("--plot", plot, *PICTURES)
    writable("--html", html)
    writable("--plot", plot)
    check_name(model)
    options = asked.options()
    import_libraries(progress)
    from int8fx.analysis.explain import explained
    from int8fx.analysis.explanation.plots import require_matplotlib
    from int8fx.bench import smollm2
    from int8fx.bench.texts import load_with_tokens

    if html or plot:
        require_matplotlib()
    loaded, token_ids = load_with_tokens(model, text, progress, int8=True)
    inputs = {"input_ids": token_ids[None, :tokens], "use_cache": False}
    title = model or smollm2.CONVERTED
    with step(progress, "Running the model, observed", counted=True) as update:
        shown = explained(loaded, (), inputs, options, name=title, on_linear=update)
    for path, write in ((html, shown.to_html), (plot, shown.plot)):
        if path is not None:
            write(path)
    if json:
        print_json(shown.to_dict())
    else:
        Console().print(shown.summary if summary else shown)


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

    A few tokens are enough, of any text. The file is for --calibration, and for the option
    "calibration" of the backend.
    """
    progress = Console(stderr=True)
    ending("--out", out, ".json")
    writable("--out", out)
    check_name(model)
    import_libraries(progress)
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
@takes_options
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, or a hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    method: MethodOption = NEAREST,
    method_text: MethodTextOption = None,
    method_tokens: MethodTokensOption = TOKENS,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Writes a model with its weights quantised, as from_pretrained reads it back.

    Afterwards, where int8fx is installed: AutoModelForCausalLM.from_pretrained(OUT)
    """
    progress = Console(stderr=True)
    options = asked.options()
    check_text([method], method_text)
    how = chosen(method, options, method_text, method_tokens)
    absent("OUT", out)
    if model.endswith(".gguf"):
        raise UserError(f"MODEL {model}{QUANTISED}")
    check_name(model)
    import_libraries(progress)
    from int8fx.cli.quantize import quantize_files

    saved = quantize_files(model, out, how, progress)
    print_json(saved.to_dict()) if json else Console().print(saved)


@app.command()
@one_line_errors
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A directory, a .safetensors or a .gguf file.")
    ],
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Says what a checkpoint holds: its format, bits, groups and sizes, and what int8fx makes of it."""
    exists("PATH", path)
    from int8fx.weights.readers.inspecting import inspect as contents_of

    contents = contents_of(path)
    print_json(contents.to_dict()) if json else Console().print(contents)


@app.command()
@one_line_errors
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory, a .safetensors or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="DST", help="The directory to make.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="int8fx and compressed-tensors keep the numbers; int8 quantises them again.",
        ),
    ] = "int8fx",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Writes a checkpoint of another system (GPTQ, AWQ, NF4, GGUF, ...) in another format.

    It goes weight by weight, and never holds the model.
    """
    exists("SRC", source)
    absent("DST", out)
    from int8fx.cli.convert import convert_files

    converted = convert_files(source, out, to, Console(stderr=True))
    print_json(converted.to_dict()) if json else Console().print(converted)


@app.command(name="compile")
@one_line_errors
@takes_options
def compile_(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The directory to make.")] = Path("compiled"),
    context: Annotated[
        int | None,
        typer.Option(
            parser=positive,
            metavar="N",
            help="How many tokens the KV cache holds (what the model was made for, at most 2048).",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of what stays in float: float32, bfloat16 or float16."),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Compiles a model into a directory that int8fx run starts from at once, without a compiler.

    It runs on machines with the instruction sets of this one, and the same torch.
    """
    progress = Console(stderr=True)
    options = asked.options()
    absent("--out", out)
    check_name(model)
    import_libraries(progress)
    from int8fx.cli.compile import compile_files

    compiled = compile_files(model, out, options, context, dtype, progress)
    print_json(compiled.to_dict()) if json else Console().print(compiled)


@app.command()
@one_line_errors
def run(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="That int8fx compile made.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="What to go on from; with --chat a question."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with it: a question a line, until an empty one.")
    ] = False,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many to generate, at most.")
    ] = 256,
    temperature: Annotated[
        float,
        typer.Option(
            parser=number, metavar="X", help="0: the most likely token; above it, tokens are drawn."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            parser=number,
            metavar="X",
            help="Draws from the most likely that add up to this share.",
        ),
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(parser=whole, metavar="N", help="Of what is drawn.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(parser=positive, metavar="N", help="By default as many as torch takes."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Runs a model that int8fx compile made; its text is on stdout, as it comes."""
    from int8fx.cli.run import Settings, talk, write

    how = Settings(tokens, temperature, top_p, seed, threads)
    if chat:
        talk(directory, prompt, how)
    elif prompt is None:
        raise UserError("a PROMPT is needed, or --chat")
    else:
        write(directory, prompt, how)


@app.command()
@one_line_errors
@takes_options
def suggest(
    model: ModelArgument = None,
    text: TextOption = None,
    kl: Annotated[
        float | None,
        typer.Option(parser=number, metavar="NATS", help="Budget: mean KL divergence from float."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(parser=number, metavar="MIB", help="Budget: of all parameters and buffers."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(parser=positive, metavar="N", help="How many tokens of the text to run on.")
    ] = 256,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the options (.json), for --options FILE."),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
    *,
    asked: Asked,
) -> None:
    """Measures what each linear costs in accuracy, and proposes options that keep a budget.

    With --kl the fastest that keep it, with --memory the most accurate. Each --scheme is a way that a
    linear may run in, the fastest first. What --rule, --skip and --only decide stays as they say. The
    columns of int8-rotated are those of --calibration, or else the largest of the text's tokens.
    """
    progress = Console(stderr=True)
    budget = _budget(kl, memory)
    ending("--out", out, ".json")
    writable("--out", out)
    check_name(model)
    ways, options = asked.ways()
    import_libraries(progress)
    from int8fx.analysis.suggest import suggest as run
    from int8fx.bench.texts import load_with_tokens

    loaded, token_ids = load_with_tokens(model, text, progress)
    inputs = {"input_ids": token_ids[None, :tokens], "use_cache": False}
    with step(progress, "Measuring each linear, then mixtures", counted=True) as on_run:
        suggestion = run(loaded, inputs, budget=budget, options=options, ways=ways, on_run=on_run)
    if out is not None:
        suggestion.save(out)
    print_json(suggestion.to_dict()) if json else Console().print(suggestion)


def _budget(kl: float | None, memory: float | None) -> dict[str, float]:
    """Raises:
    UserError: there is none, there are two, or it is no number > 0.
    """
    above_zero("--kl", kl)
    above_zero("--memory", memory)
    if kl is None and memory is None:
        raise UserError("a budget is needed: one of --kl NATS and --memory MIB")
    if kl is not None and memory is not None:
        raise UserError(
            f"--kl {kl:g} and --memory {memory:g} are two budgets: give one of --kl NATS and "
            "--memory MIB"
        )
    return {"kl": kl} if kl is not None else {"memory": (memory or 0.0) * 2**20}
