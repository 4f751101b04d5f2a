"""The command line: arguments and exit codes. What the commands do is in `_cli`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax

from . import __version__
from ._cli.convert import convert
from ._cli.diff import diff
from ._cli.finetune.run import finetune
from ._cli.generate import config_of, generate, Sampling
from ._cli.inspect import inspect
from ._cli.merge import merge
from ._cli.plan.run import plan
from ._cli.plan.step import BASES, CHECKPOINTS
from ._disk.files import legible


_LONGEST = 20_000
_ADAPTER = (
    "An adapter is a file that lora_quax.save_adapter wrote, or a folder that PEFT or "
    "lora_quax.peft.save wrote. Neither a model nor PyTorch is needed."
)
_NAMES = (
    "JSON object from names in {} to names in {}, by their beginnings, as for "
    "lora_quax.peft: '{{}}' stands for any segment. For an adapter of PEFT it may be "
    "the other way round, as for lora_quax.peft.load"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _parser() -> _Parser:
    parser = _Parser(
        "python -m lora_quax",
        description="Adapters on disk: see, compare, convert and merge them. And "
        "language models: plan a run, train an adapter, and see what it writes.",
        epilog=f"{_ADAPTER} For finetune and generate there is to be a model, for plan "
        "its config.json. Exit "
        "code 2 is trouble, of which stderr says what it is.",
    )
    parser.add_argument(
        "--version", action="version", version=f"lora_quax {__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, help: str, more: str) -> argparse.ArgumentParser:
        out = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}. {more}"
        )
        out.set_defaults(run=run)
        return out

    added = command(
        "inspect",
        lambda args: inspect(args.path),
        "show what an adapter holds, as a table",
        "The norm is the Frobenius norm of alpha/rank · b @ a. Exit code 1 if anything "
        f"is not finite, 0 otherwise. {_ADAPTER}",
    )
    added.add_argument("path", type=Path, metavar="PATH", help="an adapter")

    added = command(
        "diff",
        lambda args: diff(args.one, args.other, args.names),
        "show in what two adapters differ",
        "The relative difference of two updates is |X - Y| / max(|X|, |Y|) in the "
        f"Frobenius norm. Exit code 0 if nothing differs, 1 if something does. "
        f"{_ADAPTER}",
    )
    added.add_argument("one", type=Path, metavar="A", help="an adapter")
    added.add_argument("other", type=Path, metavar="B", help="another one")
    _add_names(added, "A", "B")

    added = command(
        "convert",
        lambda args: convert(
            args.source, args.goal, args.names, args.transposed, args.fan_in_fan_out
        ),
        "write an adapter in the other format",
        "From PEFT's format to ours, or from ours to PEFT's; the tensors stay as they "
        "are. What the other format does not have is refused, with the reason. "
        f"{_ADAPTER}",
    )
    added.add_argument("source", type=Path, metavar="SRC", help="an adapter")
    added.add_argument(
        "goal", type=Path, metavar="DST", help="a path where nothing is yet"
    )
    _add_names(added, "SRC", "DST")
    added.add_argument(
        "--transposed",
        action="append",
        default=[],
        metavar="PATH",
        help="a weight of no known layer, such as that of experts, that the Equinox "
        "model keeps as (in, out); may be given several times",
    )

    added.add_argument(
        "--fan-in-fan-out",
        action="store_true",
        help="to PEFT: its layers are those of a GPT-2, kept as (in, out)",
    )

    added = command(
        "merge",
        lambda args: merge(args.base, args.adapter, args.out, args.names, args.tied),
        "fold an adapter into a base model",
        "BASE is a file *.safetensors or a folder of them. Sums are taken in float32 "
        "(float64 if either is) and rounded once to the type of the base; names, "
        "types and metadata of the base stay, and the other files in the folder, not "
        f"below it, are copied, but for weights of other formats. {_ADAPTER}",
    )
    added.add_argument("base", type=Path, metavar="BASE", help="the base model")
    added.add_argument("adapter", type=Path, metavar="ADAPTER", help="an adapter")
    added.add_argument(
        "out", type=Path, metavar="OUT", help="a path where nothing is yet"
    )
    _add_names(added, "ADAPTER", "BASE")
    added.add_argument(
        "--tied",
        action="store_true",
        help="what adapts the embedding adapts the head that BASE ties to it",
    )

    added = command(
        "finetune",
        lambda args: finetune(args.config, args.resume),
        "train a LoRA of a language model, as a configuration says",
        "The model is a folder as on Hugging Face, of an architecture that eqx-zoo "
        "has, or a Llama in a GGUF file of llama.cpp. The adapter is written as PEFT "
        "has it, to the folder `adapter` in that of the run. Ctrl-C leaves a "
        "checkpoint.",
    )
    added.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="what to train, and how"
    )
    added.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint, bit for bit; from the start if there "
        "is none",
    )

    added = command(
        "generate",
        _generate,
        "print how a language model goes on, with an adapter or without",
        "MODEL is as for finetune. The likeliest tokens are taken, unless there is a "
        "temperature.",
    )
    _add_generation(added)

    added = command(
        "plan",
        plan,
        "say what a step of LoRA takes of each device of a mesh",
        "Of a Llama, whose config.json is all that is needed: bytes by kind, FLOPs and "
        "what is sent. Base, factors, gradients and optimiser are exact. Activations, "
        "temporaries and collectives are those of the program that XLA makes of the "
        "step, for the devices that are here if they are enough, and for CPUs if not: "
        "it is compiled and never run.",
    )
    _add_plan(added)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    def add(name: str, help: str, **options) -> None:
        parser.add_argument(name, help=help, **options)

    add(
        "--model",
        "a config.json, or the folder of one",
        type=Path,
        metavar="PATH",
        required=True,
    )
    add("--mesh", "its axes, of dp, fsdp and tp", metavar="fsdp=8,tp=4", required=True)
    add("--rank", "by default 16", type=int, default=16, metavar="N")
    add("--base", f"{', '.join(BASES)}", default="bfloat16", metavar="KIND")
    add("--batch", "rows, on all devices together", type=int, required=True)
    add("--tokens", "in a row", type=int, required=True)
    add(
        "--checkpoint",
        f"what a layer keeps: {', '.join(CHECKPOINTS)}",
        default="nothing_saveable",
        metavar="POLICY",
    )
    add(
        "--targets",
        "as for loraify, such as q_proj; by default all linear layers but the head",
        action="append",
        metavar="TARGET",
    )
    add("--no-compile", "say what shapes alone say, at once", action="store_true")
    add("--json", "for a program to read", action="store_true")


def _generate(args: argparse.Namespace) -> int:
    config = config_of(
        args.model,
        tokenizer=args.tokenizer,
        dtype=args.dtype,
        quantise=args.quantise,
        tile=args.tile,
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    return generate(
        config, args.adapter, prompt, args.max_tokens, sampling, args.chat, args.system
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    def add(name: str, help: str, **options) -> None:
        parser.add_argument(name, help=help, **options)

    add("model", "a folder, or a file *.gguf", type=Path, metavar="MODEL")
    add("prompt", "the text to go on from; - reads it from stdin", metavar="PROMPT")
    add("--adapter", _ADAPTER, type=Path, metavar="PATH")
    add("--chat", "the prompt is what a user says", action="store_true")
    add("--system", "with --chat: what the system says before", metavar="TEXT")
    add("--max-tokens", "by default 100", type=int, default=100, metavar="N")
    add("--temperature", "by default 0", type=float, default=0.0, metavar="T")
    add(
        "--top-p", "of the likeliest tokens alone", type=float, default=1.0, metavar="P"
    )
    add("--seed", "of what is drawn", type=int, default=0, metavar="N")
    add("--tokenizer", "a folder, or a tokenizer.json", type=Path, metavar="PATH")
    add("--dtype", "of its numbers", choices=("float32", "bfloat16"), default="float32")
    add("--quantise", "its linear layers", choices=("nf4", "int4", "int8"))
    add("--tile", "of them, by default 64", type=int, default=64, metavar="N")


def _add_names(parser: argparse.ArgumentParser, source: str, goal: str) -> None:
    parser.add_argument(
        "--names", type=Path, metavar="FILE.json", help=_NAMES.format(source, goal)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. **Returns:** the exit code."""
    try:
        args = _parser().parse_args(arguments)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever reads has enough. Python would complain of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ImportError, OSError, TypeError, ValueError) as e:
        text = legible(str(e), _LONGEST)
        print(f"lora_quax: error: {text}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not isinstance(e, MemoryError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(f"lora_quax: error: the memory does not suffice. {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora_quax: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
