"""Speed of inference: requests sent to engines, their times, and a report.

Two modes, as in the report (§2.1): ``sync`` sends one request after the other, ``throughput`` sends
many at once. Arms of a comparison take turns, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from mellum2_megatron.architecture import Mellum2Architecture
from mellum2_megatron.common.errors import InputError
from mellum2_megatron.common.field_checks import require_positive_int
from mellum2_megatron.evaluation.measure import Figure
from mellum2_megatron.evaluation.texts import shuffled_texts

Mode = Literal["sync", "throughput"]

PROOF_ONLY = "measured on a CPU: proof that the bench works, no statement about any GPU"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answered request.

    Attributes:
        first_token: seconds from the request to its first token.
        seconds: seconds from the request to its end.
        tokens: number of generated tokens.
        output: generated token ids or text, to compare answers with each other.
        drafted, accepted: tokens that a draft proposed, and that were kept; None without a draft.
            An engine that counts for all requests of a round gives the sum to the first.
    """

    first_token: float
    seconds: float
    tokens: int
    output: tuple[int, ...] | str
    drafted: int | None = None
    accepted: int | None = None


class Engine(Protocol):
    """A loaded model that answers requests greedily."""

    def answer(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Answer requests that arrive at once, each with ``new_tokens`` tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Sizes of a measurement.

    Attributes:
        mode: ``sync`` or ``throughput``.
        prompt, output: tokens of a request and of its answer, default 2,304 and 256 (report §2.1).
        repeats: measured rounds, default 5, after one that is thrown away.
        batch: requests at once in throughput mode, default 8.
        seed: seed of the prompts, default 1.
    """

    mode: Mode = "sync"
    prompt: int = 2304
    output: int = 256
    repeats: int = 5
    batch: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("sync", "throughput"):
            raise InputError(
                f"--mode {self.mode}", rule="no such mode", fix="use sync or throughput"
            )
        for name in ("prompt", "repeats", "batch"):
            require_positive_int(f"--{name}", getattr(self, name))
        # The time of a token is that between tokens.
        if self.output < 2:
            raise InputError(f"--output {self.output}", rule="it must be 2 or more", fix="use 64")

    def check(self, architecture: Mellum2Architecture) -> None:
        """Refuse requests longer than a model's context.

        Raises:
            InputError: they are.
        """
        longest = architecture.max_position_embeddings
        if self.prompt + self.output > longest:
            raise InputError(
                f"--prompt {self.prompt} --output {self.output}",
                rule=f"together at most max_position_embeddings={longest} tokens",
                fix="lower one of the two",
            )


def real_prompts(
    encode: Callable[[str], Sequence[int]], bench: Bench, text: Sequence[str] = ()
) -> list[list[list[int]]]:
    """Return the prompts of each round, the thrown-away one first: `[rounds][requests][tokens]`.

    Args:
        encode: token ids of a text.
        bench: sizes.
        text: files or folders to cut them from; default: Python's standard library.

    Raises:
        InputError: the texts have too few tokens.
    """
    each = bench.batch if bench.mode == "throughput" else 1
    needed = (bench.repeats + 1) * each
    prompts: list[list[int]] = []
    ids: list[int] = []
    for document in shuffled_texts(text, bench.seed):
        ids += encode(document)
        while len(ids) >= bench.prompt and len(prompts) < needed:
            prompts.append(ids[: bench.prompt])
            ids = ids[bench.prompt :]
        if len(prompts) == needed:
            break
    if len(prompts) < needed:
        raise InputError(
            f"--prompt {bench.prompt} --repeats {bench.repeats}",
            rule=f"the texts give {len(prompts)} of {needed} prompts",
            fix="name more with --text, or lower one of the two",
        )
    return [prompts[start : start + each] for start in range(0, needed, each)]


def measure_arms(
    engines: Mapping[str, Engine], rounds: Sequence[Sequence[Sequence[int]]], bench: Bench
) -> dict[str, list[list[Answer]]]:
    """Return the answers of each arm, by round; the first round warms up and is left out."""
    answers: dict[str, list[list[Answer]]] = {name: [] for name in engines}
    for number, prompts in enumerate(rounds):
        for name, engine in engines.items():
            answered = engine.answer(prompts, bench.output)
            if number:
                answers[name].append(answered)
    return answers


def figures(answers: Sequence[Sequence[Answer]]) -> tuple[Figure, ...]:
    """Return the figures of one arm; a round is one item of an interval.

    ``first token`` and ``token`` are means over the requests of a round. ``tokens a second`` counts
    all tokens of a round until its last request ends. ``drafts accepted`` is the share of all
    drafted tokens.
    """
    rounds = [list(one) for one in answers]

    def mean(values: Callable[[Answer], float]) -> list[float]:
        return [sum(map(values, one)) / len(one) for one in rounds]

    found = [
        Figure.mean("first token", mean(lambda a: a.first_token), "s"),
        Figure.mean(
            "token", mean(lambda a: (a.seconds - a.first_token) / max(1, a.tokens - 1)), "s"
        ),
        Figure.mean("request", mean(lambda a: a.seconds), "s"),
        Figure.mean(
            "tokens a second",
            [sum(a.tokens for a in one) / max(a.seconds for a in one) for one in rounds],
            "1/s",
        ),
    ]
    counts = [
        (sum(a.accepted or 0 for a in one), sum(a.drafted or 0 for a in one)) for one in rounds
    ]
    if any(drafted for _accepted, drafted in counts):
        found.append(Figure.pooled_share("drafts accepted", counts))
    return tuple(found)


def bench_report(
    answers: Mapping[str, Sequence[Sequence[Answer]]],
    bench: Bench,
    *,
    model: str,
    engine: str,
    device: str,
    facts: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the results as JSON types.

    Args:
        answers: result of `measure_arms`.
        bench: sizes.
        model: the folder.
        engine: name and version of the engine.
        device: ``cpu`` or the name of a GPU.
        facts: what else is known of each arm, such as its parameters and memory.

    Returns:
        ``model``, ``engine``, ``device``, ``bench``, ``arms`` (name -> ``figures`` and facts),
        ``equal`` (arm -> share of its answers that equal the first arm's), and ``notes``.
    """
    first = next(iter(answers))
    outputs = {
        name: [answer.output for one in rounds for answer in one]
        for name, rounds in answers.items()
    }
    equal = {
        name: sum(a == b for a, b in zip(outputs[name], outputs[first], strict=True))
        / len(outputs[first])
        for name in answers
        if name != first and facts[name].get("same_model")
    }
    return {
        "model": model,
        "engine": engine,
        "device": device,
        "bench": asdict(bench),
        "arms": {
            name: {"figures": [asdict(one) for one in figures(rounds)], **facts[name]}
            for name, rounds in answers.items()
        },
        "equal": equal,
        "notes": [PROOF_ONLY] if device == "cpu" else [],
    }
