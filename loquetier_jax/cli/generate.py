"""`loquetier generate`: completes prompts and streams the text, once per named adapter."""

import argparse
import json
import sys
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from loquetier_jax.cli.options import (
    BASE,
    add_adapter_option,
    add_engine_options,
    build_engine,
    load_adapters,
    new_parser,
    resolve_config,
    settings,
    stderr_console,
)
from loquetier_jax.cli.prompt_line import prompt_of
from loquetier_jax.errors import RequestError
from loquetier_jax.json_records import read_records
from loquetier_jax.token_ids import are_token_ids

if TYPE_CHECKING:
    from loquetier_jax.engine import Engine
    from loquetier_jax.sampling_params import SamplingParams
    from loquetier_jax.serve.frontend import RequestHandle
    from loquetier_jax.serve.output import RequestOutput, StreamPiece

DESCRIPTION = """\
Completes prompts: the arguments, the lines of --file, or all of stdin. All run at once; their texts are printed in
order, streamed. With several --adapter options, each prompt is answered once by each adapter.

  loquetier generate "count: 3 4 5 6"
  loquetier generate --chat "What does the owl eat?" --adapter base --adapter pirate=runs/pirate/adapter
  loquetier generate --file prompts.jsonl --json > answers.jsonl

A line of a .jsonl file, or an element of the array in a .json file, is {"prompt": TEXT or TOKEN IDS} or
{"messages": [...]}, optionally with "adapter" and sampling parameters that override the options, and for messages
"tools" and "chat_template_kwargs". In any other file, each line is a prompt."""

CHAT_KEYS = ("tools", "chat_template_kwargs")
LINE_KEYS = ("prompt", "adapter", *CHAT_KEYS)


@dataclass
class Asked:
    """One prompt to complete with one adapter."""

    prompt: Any
    adapter: str | None
    params: "SamplingParams"
    chat: dict[str, Any] = field(default_factory=dict)  # tools and chat_template_kwargs
    pieces: "deque[StreamPiece]" = field(default_factory=deque)
    submitted: "RequestHandle | None" = None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command."""
    parser = new_parser(commands, "generate", "complete prompts, with or without adapters", DESCRIPTION)
    parser.add_argument("prompt", nargs="*", help="prompts; without any, and without --file, stdin is one prompt")
    parser.add_argument("--file", metavar="FILE", help="a prompt per line, or JSON lines in a .jsonl file")
    parser.add_argument("--chat", action="store_true", help="treat prompts as user messages: apply the chat template")
    add_adapter_option(parser, f"PEFT folder to load and answer with; may be repeated; {BASE} is the base itself")
    sampling = parser.add_argument_group("sampling", "vLLM's names; the default is greedy, 128 tokens")
    sampling.add_argument("--max-tokens", type=int, default=128, metavar="N")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P")
    sampling.add_argument("--seed", type=int, metavar="N")
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help=r"\n is a line break")
    sampling.add_argument(
        "-s",
        "--sampling",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other field of SamplingParams, e.g. -s top_k=40 -s logprobs=2",
    )
    add_engine_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    console = stderr_console()
    defaults = sampling_of(args)
    lines = prompts_of(args)
    names = [name for name, _ in args.adapter] or [BASE]
    asked = [one for line in lines for one in asked_by(line, names, defaults, args.chat)]
    _check(asked, names, resolve_config(args).max_model_len)
    engine = build_engine(args, console)
    load_adapters(engine, args.adapter)
    for one in asked:
        one.submitted = engine.submit(one.prompt, one.adapter, one.params, **one.chat, listener=one.pieces.append)
    for one in asked:
        if args.json:
            engine.wait(lambda one=one: one.submitted.finished)
            print(json.dumps(as_json(one.submitted.output(), one.prompt)), flush=True)
        else:
            _show(engine, one, console if len(asked) > 1 else None)
    return 0


def _check(asked: list[Asked], names: list[str], max_model_len: int) -> None:
    """Refuses requests that would fail with any model, before one is loaded."""
    for one in asked:
        if one.adapter is not None and one.adapter not in names:
            raise RequestError(f"adapter: got {one.adapter!r}, expected one loaded with --adapter: {names}")
        ids = len(one.prompt) if are_token_ids(one.prompt) else 1
        total = ids + (one.params.max_tokens or 1)
        if total > max_model_len:
            raise RequestError(
                f"max_tokens: got {one.params.max_tokens} plus at least {ids} prompt tokens, expected <= "
                f"max_model_len {max_model_len} in total"
            )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters given as options."""
    from loquetier_jax.sampling_params import SamplingParams

    found = {key: getattr(args, key) for key in ("max_tokens", "temperature", "top_p", "seed")}
    stop = [text.replace("\\n", "\n") for text in args.stop]
    return found | {"stop": stop} | SamplingParams.in_own_words(settings(args.sampling, "--sampling"))


def sampling_params(values: dict[str, Any], where: str) -> "SamplingParams":
    """SamplingParams from plain data; errors start with `where`.

    Raises:
        RequestError: an unknown field, or a value that is refused.
    """
    from loquetier_jax.sampling_params import SamplingParams

    known = {f.name for f in fields(SamplingParams)}
    for key in values:
        if key not in known | SamplingParams.borrowed:
            raise RequestError(f"{where}{key}: unknown, expected one of {sorted(known)}")
    if isinstance(bias := values.get("logit_bias"), dict):  # the keys of a JSON object are strings
        values = values | {"logit_bias": {int(k) if str(k).isdecimal() else k: v for k, v in bias.items()}}
    return SamplingParams(**values)


def _own_words(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Translates a line's arguments to our field names, so that they override the options."""
    from loquetier_jax.sampling_params import SamplingParams

    try:
        return SamplingParams.in_own_words(values)
    except RequestError as error:
        raise RequestError(f"{where}{error}") from error


def prompts_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One {"prompt": text, ids or messages, ...} per prompt."""
    if args.prompt and args.file:
        raise RequestError("--file: got prompts as arguments as well, expected only one of the two")
    if args.prompt:
        return [{"prompt": text} for text in args.prompt]
    if args.file is None:
        if sys.stdin.isatty():
            raise RequestError("prompt: got none, expected arguments, --file or text on stdin")
        return [{"prompt": sys.stdin.read().rstrip("\n")}]
    if args.file.endswith((".jsonl", ".json")):
        return [_parse(data, where) for where, data in read_records(args.file, RequestError)]
    try:
        text = Path(args.file).read_text(encoding="utf-8-sig")  # drops the byte order mark that Windows adds
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--file {args.file}: {error}") from error
    return [{"prompt": line} for line in text.split("\n") if line.strip()]


def _parse(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or data.keys().isdisjoint(("prompt", "messages")):
        raise RequestError(f'{where}: got {data!r:.80}, expected an object with "prompt" or "messages"')
    if not isinstance(data.get("adapter"), (str, type(None))):
        raise RequestError(f"{where}: adapter: got {data['adapter']!r:.80}, expected a name or null")
    rest = {key: value for key, value in data.items() if key != "messages"}
    return rest | {"prompt": prompt_of(data, where, RequestError), "where": f"{where}: "}


def asked_by(line: dict[str, Any], names: list[str], defaults: dict[str, Any], chat: bool) -> list[Asked]:
    """The completions requested by one line."""
    where = line.pop("where", "")
    own = {k: v for k, v in line.items() if k not in LINE_KEYS}
    params = sampling_params(defaults | _own_words(own, where), where)
    prompt = line["prompt"]
    if chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    adapters = [line["adapter"] or BASE] if "adapter" in line else names
    given = {key: line[key] for key in CHAT_KEYS if key in line}
    return [Asked(prompt, None if name == BASE else name, params, given) for name in adapters]


def _show(engine: "Engine", one: Asked, console: Console | None) -> None:
    """Prints the completions of one prompt, streamed if there is only one, after a heading if `console` is given."""
    if console is not None:
        console.print(f"[bold]{one.adapter or BASE}[/] [dim]{_short(one.prompt)}[/]", highlight=False)
    if one.params.n > 1:
        engine.wait(lambda: one.submitted.finished)
        print("\n---\n".join(output.text for output in one.submitted.output().outputs), flush=True)
        _refuse_failed(one.submitted.output())
        return
    while one.pieces or not one.submitted.finished:
        engine.wait(lambda: bool(one.pieces) or one.submitted.finished)
        while one.pieces:
            sys.stdout.write(one.pieces.popleft().text)
            sys.stdout.flush()
    sys.stdout.write("\n")
    _refuse_failed(one.submitted.output())


def _refuse_failed(output: "RequestOutput") -> None:
    failed = next((o for o in output.outputs if o.finish_reason == "error"), None)
    if failed is not None:
        raise RequestError(f"{output.request_id}: failed: {failed.stop_reason}")


def _short(prompt: Any) -> str:
    text = prompt[-1].get("content", "") if isinstance(prompt, list) and isinstance(prompt[-1], dict) else str(prompt)
    line = " ".join(str(text).split())
    return line if len(line) <= 70 else line[:67] + "..."


def as_json(output: "RequestOutput", prompt: Any) -> dict[str, Any]:
    """A RequestOutput as plain data, with times in milliseconds.

    Args:
        output: A finished output.
        prompt: The original prompt: text, token ids or messages.
    """
    metrics = output.metrics
    ends = metrics.finished_time
    times = {
        "ttft_ms": metrics.ttft,
        "tpot_ms": metrics.tpot,
        "e2el_ms": ends and ends - metrics.arrival_time,
    }
    return {
        "prompt": prompt,
        "adapter": output.adapter,
        "version": output.version,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "outputs": [_completion(o) for o in output.outputs],
        **{name: None if value is None else round(1e3 * value, 3) for name, value in times.items()},
    }


def _completion(output: Any) -> dict[str, Any]:
    found = {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        tokens = [{str(i): lp.logprob for i, lp in one.items()} for one in output.logprobs]
        found |= {"cumulative_logprob": output.cumulative_logprob, "logprobs": tokens}
    return found
