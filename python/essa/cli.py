"""The `essa` command. Only what a command needs is imported, and only once it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import signal
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from essa.config import (
    DEVICES,
    WITH_COMMAS,
    ESSAConfig,
    InputError,
    SFTConfig,
    read_chat_template_kwargs,
    suggest,
)
from essa.data import DATA_DIR, DATASET_CONFIG, DATASET_SPLIT, DataSettings, absolute
from essa.rows import read_rows
from essa.trdpo.settings import CommandSettings

EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143
RECORD, YAML = "essa.record", "essa.yaml"
"""Where options have their values from that are not on the command line."""
RESUMED = "Its options need not be repeated, but for those that bring in code: module:name, --trust_remote_code."

app = typer.Typer(
    name="essa",
    help="Align language models without gradients, by evolving the singular values of a LoRA adapter, or its weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help shows every option name in full, however narrow the terminal.
    rich_markup_mode=None,
    # --output-dir is accepted for --output_dir.
    context_settings={
        "token_normalize_func": lambda token: token.replace("-", "_"),
        "help_option_names": ["--help", "-h"],
    },
)


def main() -> None:
    """Entry point of the `essa` command."""
    app()


def _read_config(context: typer.Context, path: str | None) -> str | None:
    """Take the defaults of this command's options from a YAML file."""
    if path is not None:
        import yaml

        try:
            settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise typer.BadParameter(f"cannot read {path!r}: {error}") from error
        if not isinstance(settings, dict):
            raise typer.BadParameter(f"{path!r} must hold `option: value` lines, got {type(settings).__name__}")
        _add_defaults(context, YAML, _known(settings, context, path))
    return path


def _known(settings: dict[Any, Any], context: typer.Context, path: str) -> dict[str, Any]:
    """A YAML file's settings as this command's options take them."""
    options = {name.lstrip("-"): option for option in context.command.params for name in option.opts}
    del options["config"]
    known: dict[str, Any] = {}
    for written, value in settings.items():
        name = str(written).replace("-", "_")
        if name not in options:
            raise typer.BadParameter(f"{path!r}: unknown option {name!r}{suggest(name, options)}")
        option: Any = options[name]
        if option.name in known:
            raise typer.BadParameter(f"{path!r}: option {option.name!r} is given twice")
        if value is None:
            continue
        value = _with_commas(option.name, value)
        if option.multiple and not isinstance(value, list):
            value = [value]
        elif isinstance(value, list) and not option.multiple:
            raise typer.BadParameter(f"{path!r}: option {name!r} takes one value, got {value!r}")
        elif isinstance(value, dict):
            try:
                value = json.dumps(value)
            except TypeError as error:
                raise typer.BadParameter(f"{path!r}: option {name!r} takes what JSON can say, got {value!r}") from error
        known[option.name] = value
    return known


def _with_commas(name: str, value: Any) -> Any:
    """A list as an option takes it that has commas between its names; every other value as it is."""
    return ",".join(map(str, value)) if isinstance(value, list) and name in WITH_COMMAS else value


def _read_run(context: typer.Context, directory: str | None) -> str | None:
    """Take the defaults of `essa align` from the run that is to be resumed."""
    if directory is not None:
        from essa.checkpoint import Run

        try:
            recorded = Run.read(directory).command
        except InputError as error:
            raise typer.BadParameter(str(error)) from error
        _add_recorded(context, recorded, directory)
    return directory


def _read_trdpo(context: typer.Context, directory: str | None) -> str | None:
    """Take the defaults of `essa trdpo` from the run that is to be resumed."""
    if directory is not None:
        from essa.checkpoint import read_command

        try:
            recorded = read_command(Path(directory))
        except InputError as error:
            raise typer.BadParameter(str(error)) from error
        _add_recorded(context, recorded, directory)
    return directory


def _add_recorded(context: typer.Context, recorded: dict[str, Any], directory: str) -> None:
    # Not those that read a file: a record could name one that names code.
    options = {option.name for option in context.command.params if not option.is_eager}
    given = {
        name: _with_commas(name, value)
        for name, value in {**recorded, "output_dir": directory}.items()
        if value is not None and name in options
    }
    _add_defaults(context, RECORD, given)


def _add_defaults(context: typer.Context, source: str, values: dict[str, Any]) -> None:
    """A YAML file wins over what a run was started with, whichever is read first."""
    context.meta[source] = values
    context.default_map = {**context.meta.get(RECORD, {}), **context.meta.get(YAML, {})}


def _check_recorded(context: typer.Context, values: dict[str, Any]) -> None:
    """Raise `InputError` if a value that neither the command line nor a YAML file gives brings in code."""
    record = context.meta.get(RECORD)
    if record is not None:
        from essa.recorded import check_recorded

        typed = {name for name in values if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        alone = record.keys() - typed - context.meta.get(YAML, {}).keys()
        check_recorded({name: value for name, value in values.items() if name in alone}, record["output_dir"])


def _command(*settings: type) -> Callable[[Callable], Callable]:
    """Register a command; its `**settings` become one option for each field of the `settings` dataclasses.

    Bad input ends it with one line on stderr and exit code 2, Ctrl-C with exit code 130, SIGTERM with 143.
    """

    def register(function: Callable) -> Callable:
        hints = typing.get_type_hints(function, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        for kind in settings:
            parameters += _options(kind)
        parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)

        def run(context: typer.Context, **values: Any) -> None:
            try:
                _check_recorded(context, values)
                with _stopped_by_sigterm():
                    function(**values)
            except InputError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(EXIT_BAD_INPUT) from error
            except _Terminated as signalled:
                raise typer.Exit(EXIT_TERMINATED) from signalled
            except KeyboardInterrupt as interrupt:
                raise typer.Exit(EXIT_INTERRUPTED) from interrupt

        # Typer reads the options off the signature.
        vars(run)["__signature__"] = inspect.Signature(parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(function.__name__, help=function.__doc__)(run)

    return register


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated as Ctrl-C is."""


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _options(settings: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(settings)
    options = []
    for field in dataclasses.fields(settings):
        hint = field.metadata.get("option") or hints[field.name]
        names = [f"--{field.name}/--no_{field.name}" if hint is bool else f"--{field.name}"]
        names += [f"--{alias}"] if (alias := field.metadata.get("alias")) else []
        required = field.default is dataclasses.MISSING
        options.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else field.default,
                annotation=Annotated[hint, typer.Option(*names, help=field.metadata["help"])],
            )
        )
    return options


def _take_data(settings: dict[str, Any]) -> DataSettings:
    return DataSettings(**{field.name: settings.pop(field.name) for field in dataclasses.fields(DataSettings)})


Model = Annotated[str, typer.Option("--model_name_or_path", help="Base model: a local folder or a name on the hub.")]
Data = Annotated[
    str,
    typer.Option(
        "--dataset_name",
        help="Rows with a `prompt` (text or chat messages): a .jsonl, .json or .csv file (or one of them .gz), a .parquet file, "
        "or a name on the hub.",
    ),
]
DataSplit = Annotated[str, typer.Option("--dataset_split", help=DATASET_SPLIT)]
DataConfig = Annotated[str | None, typer.Option("--dataset_config", help=DATASET_CONFIG)]
DataDir = Annotated[str | None, typer.Option("--data_dir", help=DATA_DIR)]
RewardNames = Annotated[
    list[str],
    typer.Option(
        "--reward",
        help="exact_match (completion equals the column `answer` or `solution`), math (equal as mathematics), or "
        "path.to.module:function with TRL's reward signature. Repeat it to add several up.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", callback=_read_config, is_eager=True, help="YAML file with these options; the command line wins."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust_remote_code", help="Run Python code that comes with the model. Off unless you trust it."),
]


@_command(DataSettings, ESSAConfig)
def align(
    model_name_or_path: Model,
    dataset_name: Data,
    reward: RewardNames,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="Warm-start LoRA adapter: folder or hub name. Make one with `essa sft`."),
    ] = None,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume_from_checkpoint",
            callback=_read_run,
            is_eager=True,
            help=f"Folder of a run to continue. {RESUMED} --generations may ask for more.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Align a model: search its LoRA adapter, or its weights, for the highest reward. The result is output_dir/adapter or
    output_dir/model."""
    data, args = _take_data(settings), ESSAConfig(**settings)
    from essa.checkpoint import Run
    from essa.rewards import find_reward

    for name in reward:
        find_reward(name)
    if resume_from_checkpoint is None:
        Run.refuse_existing(args.output_dir)
    train, evaluation = data.read(dataset_name, args.seed)
    _quiet()
    from essa.models import ModelSource
    from essa.trainer import ESSATrainer

    source = ModelSource(
        model_name_or_path,
        adapter,
        dtype=args.dtype,
        quantization=args.quantization,
        device=args.device,
        trust_remote_code=trust_remote_code,
    )
    trainer = ESSATrainer(source, reward, args, train, evaluation)
    trainer.about["command"] = {
        "model_name_or_path": absolute(model_name_or_path),
        "adapter": absolute(adapter),
        "dataset_name": absolute(dataset_name),
        "reward": reward,
        "trust_remote_code": trust_remote_code,
        **data.recorded(),
        **settings,
    }
    summary = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    folder = Path(args.output_dir)
    if "eval_reward" in summary:
        typer.echo(f"evaluation: {summary['eval_reward_before']:.3f} -> {summary['eval_reward']:.3f}")
    typer.echo(f"{summary['samples']:,} samples in {summary['seconds']:.1f} s")
    if "bytes_per_worker" in summary:
        typer.echo(f"network: at most {summary['bytes_per_worker']:,} bytes per worker and generation")
    output = trainer.search.space.output
    typer.echo(f"{output + ':':<8} {folder / output}\nreport:  {folder / 'report.html'}")


@_command(DataSettings, CommandSettings)
def trdpo(
    model_name_or_path: Model,
    dataset_name: Annotated[
        str,
        typer.Option(
            "--dataset_name",
            help="Pairs (`prompt`, `chosen`, `rejected`; Anthropic's HH and OpenAI's TL;DR as they are) or, with "
            "--loss_type kto, judged rows (`prompt`, `completion`, `label`): a file or a name on the hub.",
        ),
    ],
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", help="LoRA adapter to start from: folder or hub name. Default: a new one."),
    ] = None,
    resume_from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume_from_checkpoint",
            callback=_read_trdpo,
            is_eager=True,
            help=f"Folder of a run to continue from its last checkpoint. {RESUMED}",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Align a model to preferences: DPO, IPO or KTO with a reference that follows the policy (TR-DPO).

    The result is output_dir/adapter, or output_dir/model with --lora_r 0.
    """
    data, options = _take_data(settings), CommandSettings(**settings)
    options.check()
    _quiet()
    from essa.trdpo.command import run_trdpo

    run_trdpo(
        options,
        model_name_or_path=model_name_or_path,
        adapter=adapter,
        dataset_name=dataset_name,
        data=data,
        resume_from_checkpoint=resume_from_checkpoint,
        trust_remote_code=trust_remote_code,
        say=lambda line: typer.echo(line, err=line.startswith("step")),
    )


@_command(SFTConfig)
def sft(
    model_name_or_path: Model,
    dataset_name: Annotated[
        str,
        typer.Option(
            "--dataset_name",
            help="Rows with `prompt` and `completion`, both text or both chat messages: a file or a name on the hub.",
        ),
    ],
    dataset_split: DataSplit = "train",
    dataset_config: DataConfig = None,
    data_dir: DataDir = None,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option("--device", help=DEVICES)] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Make a warm start: train a LoRA adapter on demonstrations. `essa align --adapter` takes it from there."""
    args = SFTConfig(**settings)
    rows = read_rows(dataset_name, split=dataset_split, config=dataset_config, data_dir=data_dir)
    _quiet()
    from essa.models import load_base
    from essa.sft import sft as train

    model, tokenizer = load_base(model_name_or_path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    def log(step: int, loss: float) -> None:
        if step % max(1, args.max_steps // 20) == 0 or step == args.max_steps:
            typer.echo(f"step {step}/{args.max_steps}: loss {loss:.4f}", err=True)

    train(model, tokenizer, rows, args, log=log)
    typer.echo(f"adapter: {args.output_dir}")


@_command()
def eval(
    model_name_or_path: Model,
    dataset_name: Data,
    reward: RewardNames,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="LoRA adapter: folder or hub name. Default: the bare model.")
    ] = None,
    dataset_split: DataSplit = "test",
    dataset_config: DataConfig = None,
    data_dir: DataDir = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest completion, in tokens.", min=1)
    ] = 256,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option("--chat_template_kwargs", help="Further arguments of the chat template, as JSON, as in the run."),
    ] = None,
    row_budget: Annotated[int, typer.Option("--row_budget", help="Most sequences decoded in one batch.", min=1)] = 256,
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as saved), float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[
        str,
        typer.Option("--quantization", help="Quantise the linear layers: int8, int4 (computes in bfloat16) or none."),
    ] = "none",
    device: Annotated[str, typer.Option("--device", help=DEVICES)] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
) -> None:
    """Measure a model, with or without an adapter: mean reward (accuracy) of greedy completions.

    A table goes to stderr, the same numbers as JSON to stdout.
    """
    template = read_chat_template_kwargs(chat_template_kwargs)
    rows = read_rows(dataset_name, split=dataset_split, config=dataset_config, data_dir=data_dir)
    _quiet()
    from essa.evaluate import check_prompts, evaluate
    from essa.models import load_adapter, load_base
    from essa.rewards import Rewards

    rewards = Rewards(reward, None)
    base, tokenizer = load_base(
        model_name_or_path,
        dtype=dtype,
        quantization=quantization,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    model = base if adapter is None else load_adapter(base, adapter)
    prompts = check_prompts(
        rows,
        model,
        tokenizer,
        rewards,
        name="dataset_name",
        max_new_tokens=max_new_tokens,
        chat_template_kwargs=template,
    )
    numbers = evaluate(model, tokenizer, prompts, rewards, max_new_tokens=max_new_tokens, row_budget=row_budget)
    result = {
        "model": model_name_or_path,
        "adapter": adapter,
        "dataset": dataset_name,
        "rewards": rewards.names,
        **numbers,
        "samples_per_second": numbers["samples"] / numbers["seconds"],
        "tokens_per_second": numbers["tokens"] / numbers["seconds"],
    }
    _print_table(result)
    typer.echo(json.dumps(result))


@_command()
def demo(
    output_dir: Annotated[
        str, typer.Option("--output_dir", help="Folder of everything the demo makes.")
    ] = "demo-output",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the warm start and of the search.", min=0)] = 0,
    parametrization: Annotated[
        str, typer.Option("--parametrization", help="What is searched: svd, lora, lowrank or full.")
    ] = "svd",
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="How: zo-grpo, cma, cma-diagonal, es or es-per-completion; by default what align takes for the "
            "parametrization.",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option("--compare", help="grpo: also run TRL's GRPOTrainer from the same warm start (needs trl)."),
    ] = None,
    trdpo: Annotated[
        bool,
        typer.Option("--trdpo", help="Instead: fixed and moving references on a task whose true reward is known."),
    ] = False,
) -> None:
    """Watch a tiny model being aligned, from its warm start to the report, in about a minute on a laptop."""
    if compare not in (None, "grpo"):
        raise InputError(f"compare must be grpo, got {compare!r}")
    if trdpo and compare:
        raise InputError("compare must not be given with trdpo")
    if trdpo and strategy:
        raise InputError("strategy must not be given with trdpo, which searches nothing")
    _quiet()
    if trdpo:
        from essa.trdpo.demo import run_trdpo_demo

        run_trdpo_demo(output_dir, typer.echo)
        return
    from essa.demo.run import run_demo

    run_demo(output_dir, seed=seed, compare=compare, parametrization=parametrization, strategy=strategy)


@_command()
def plan(
    model_name_or_path: Model,
    gpus: Annotated[int, typer.Option("--gpus", help="GPUs to plan for.", min=1)] = 1,
    gpus_per_worker: Annotated[
        int, typer.Option("--gpus_per_worker", help="GPUs that a worker's model is spread over.", min=1)
    ] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            "--gpu",
            help="Kind of GPU, whose data sheet gives memory and rates: a100, h100, h200 or l4; measure: memory and rates of "
            "this machine, by running a chunk here as a worker would.",
        ),
    ] = "h100",
    prefill_tokens_per_second: Annotated[
        float | None,
        typer.Option(
            "--prefill_tokens_per_second",
            help="Prompt tokens a second that a worker reads with a full chunk, where you know it better than the data "
            "sheet. Needs --decode_step_seconds.",
        ),
    ] = None,
    decode_step_seconds: Annotated[
        float | None,
        typer.Option(
            "--decode_step_seconds",
            help="Seconds in which a worker adds one token to every sequence of a full chunk; smaller chunks are taken to "
            "need as long. Needs --prefill_tokens_per_second.",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", help="LoRA adapter that --gpu measure runs with. Default: a new one like `essa sft`'s."
        ),
    ] = None,
    threads_per_worker: Annotated[
        int, typer.Option("--threads_per_worker", help="CPU threads that --gpu measure runs on.", min=1)
    ] = ESSAConfig.threads_per_worker,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB of memory of a GPU. Default: the data sheet's.")
    ] = None,
    population_size: Annotated[int, typer.Option("--population_size", help="Members.", min=2)] = 96,
    prompts_per_generation: Annotated[
        int, typer.Option("--prompts_per_generation", help="Prompts that every member answers.", min=1)
    ] = 64,
    prompt_tokens: Annotated[int, typer.Option("--prompt_tokens", help="Longest prompt, in tokens.", min=1)] = 256,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest completion, in tokens.", min=2)
    ] = 256,
    row_budget: Annotated[
        int | None,
        typer.Option("--row_budget", help="Sequences to a chunk. Default: as many as fit, for one chunk a GPU."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "bfloat16",
    quantization: Annotated[str, typer.Option("--quantization", help="int8, int4 or none.")] = "none",
    trust_remote_code: TrustRemoteCode = False,
    config: Config = None,
) -> None:
    """Plan a run on paper: memory, chunks, seconds per generation, and scaling from 1 to 1024 workers.

    Tables go to stderr, the same numbers as JSON to stdout. Only --gpu measure loads the model's weights.
    """
    from essa.plan import plan as make_plan

    _quiet()
    result = make_plan(
        model_name_or_path,
        gpus=gpus,
        gpus_per_worker=gpus_per_worker,
        gpu=gpu,
        memory=memory,
        members=population_size,
        prompts=prompts_per_generation,
        prompt_tokens=prompt_tokens,
        new_tokens=max_new_tokens,
        row_budget=row_budget,
        dtype=dtype,
        quantization=quantization,
        prefill_tokens_per_second=prefill_tokens_per_second,
        decode_step_seconds=decode_step_seconds,
        adapter=adapter,
        threads_per_worker=threads_per_worker,
        trust_remote_code=trust_remote_code,
    )
    _print_table({name: value for name, value in result.items() if name != "scaling"})
    _print_rows(result["scaling"])
    typer.echo(json.dumps(result))


@_command()
def info() -> None:
    """Show which kernels serve this machine, and why the others do not. Attach it to a bug report."""
    import essa_kernels

    typer.echo(str(essa_kernels.explain()))
    typer.echo(json.dumps(essa_kernels.env_report(), indent=2))


def _print_table(rows: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in rows.items():
        shown = ", ".join(value) if isinstance(value, list) else f"{value:,.4g}" if isinstance(value, float) else value
        table.add_row(name, str(shown))
    Console(stderr=True).print(table)


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:,.4g}" for value in row.values()))
    Console(stderr=True).print(table)


def _quiet() -> None:
    """Keep other libraries' bars and advice out of the output."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # PEFT imports torchao where it is installed, which warns of every extension this machine has no hardware for.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
