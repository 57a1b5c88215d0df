"""Where a decode step's time goes on a CPU, operator by operator.

For each operator, over all layers: the bytes that it has to move, its operations, the time that this machine needs for them at
least (its measured read bandwidth, its best measured matrix product), and what it takes. "everything else" is the step less its
operators: scheduling, laying out the batch, handing tokens out, Python.

The step is a real one: a batch of sequences is brought to a context in the engine, and the recording of its layers is replayed
operator by operator, all layers of one operator behind one another. Before each measurement the head's weights, more than a
processor's cache holds, are read, so that an operator finds its own in memory, as in a step.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from ..core.capture import LayerReplay
from ..core.config import DEFAULT_MODEL, EngineConfig
from ..core.engine import LLMEngine
from ..core.sampling.selection_cpu import native_argmax
from ..models.costs.operators import OPERATORS, costs
from ..models.llama import LlamaDecoderLayer, LlamaForCausalLM
from .gpu import submit
from .kernels import Ceilings, measure_ceilings
from .report import Parser, finish, one_line_errors, show_table
from .timing import median_seconds


@dataclass(slots=True)
class OperatorTime:
    """One operator over all layers of a step. Seconds are medians; `floor` is None for what is Python's."""

    operator: str
    bytes: int
    operations: int
    seconds: float
    floor: float | None


def profile_step(
    engine: LLMEngine, ceilings: Ceilings, precision: str, batch: int, context: int, repeats: int
) -> list[OperatorTime]:
    """Bring `batch` sequences to `context` tokens in an idle engine, time whole steps there, and then their operators, with
    weights in a `precision` that is a key of `Ceilings.operations`. Raises ValueError if the engine is not on the CPU's kernels
    with replay and a LLaMA model, or cannot take the whole batch in one step."""
    model = engine.executor.worker.model
    only = "only replayed steps of LLaMA's layers can be profiled"
    if not isinstance(model, LlamaForCausalLM) or model.decoder_layer is not LlamaDecoderLayer:
        raise ValueError(f"{only}, and this model has others")
    if not isinstance(model.model.run_layers, LayerReplay):
        raise ValueError(f"{only}: on a CPU with a compiler, not --enforce-eager")
    if batch > engine.config.max_num_seqs or batch * context > engine.limits.max_num_batched_tokens:
        raise ValueError(
            f"{batch} sequences of {context} tokens do not fit one step, which takes {engine.config.max_num_seqs} "
            f"sequences and {engine.limits.max_num_batched_tokens} tokens"
        )
    half = repeats // 2 + 1
    submit(engine, batch, context - half, 2 * half)
    engine.step()  # all prompts
    step = median_seconds(engine.step, half)
    config, dtype = engine.model_config, engine.executor.worker.dtype
    layers, head = model.model.run_layers, model.lm_head
    hidden = torch.randn(batch, config.hidden_size, dtype=dtype)
    calls = range(len(layers.recording) - 1)  # the last one is the norm before the head
    times = {}
    for number, name in enumerate(OPERATORS):
        part = layers.recording.part(i for i in calls if i % len(OPERATORS) == number)
        times[name] = median_seconds(lambda part=part: part.replay(batch), repeats, before=lambda: head(hidden))
    times["lm_head"] = median_seconds(lambda: head(hidden), repeats, before=lambda: layers.recording.replay(batch))
    logits = head(hidden)
    times["arg-max"] = median_seconds(lambda: native_argmax(logits), repeats, before=lambda: head(hidden))
    for seq in [*engine.scheduler.running]:
        engine.abort_request(seq.request_id)
    rows, weight = [], 1 if precision == "int8" else dtype.itemsize
    for name, (num_bytes, operations) in costs(config, batch, context, weight, dtype.itemsize).items():
        computed_in = precision if "proj" in name or name == "lm_head" else str(dtype).removeprefix("torch.")
        least = ceilings.floor(computed_in, num_bytes, operations)
        rows.append(OperatorTime(name, num_bytes, operations, times[name], least))
    return [*rows, OperatorTime("everything else", 0, 0, step - sum(times.values()), None)]


def show(ceilings: Ceilings, batch: int, rows: list[OperatorTime]) -> None:
    def times(floor: float, seconds: float) -> list[str]:
        return [f"{floor * 1e3:.2f}", f"{seconds * 1e3:.2f}", f"{floor / seconds:.0%}"]

    *operators, rest = rows
    cells = [[r.operator, f"{r.bytes / 1e6:.1f}", f"{r.operations / 1e6:.0f}", *times(r.floor, r.seconds)] for r in operators]
    cells.append([rest.operator, "", "", "", f"{rest.seconds * 1e3:.2f}", ""])
    cells.append(["step", "", "", *times(sum(r.floor for r in operators), sum(r.seconds for r in rows))])
    title = f"A decode step of {batch}; reads {ceilings.read_bytes / 1e9:.0f} GB/s; {torch.get_num_threads()} threads"
    show_table(title, ["operator", "MB", "MFLOP", "floor, ms", "ms", "of the floor"], cells)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("step_profile", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "a LLaMA model")
    parser.add_flag("--batches", [1, 32], "sequences in a step")
    parser.add_flag("--context", 256, "tokens of each")
    parser.add_argument("--quantization", choices=["int8"], help="quantization of the weights (default: none, bfloat16)")
    parser.add_flag("--repeats", 41, "measurements; the median counts")
    args = parser.parse_args(argv)
    if args.context <= args.repeats:
        parser.error(f"--context {args.context} must be larger than --repeats {args.repeats}")
    largest = max(args.batches)
    with one_line_errors():
        config = EngineConfig(
            args.model, device="cpu", quantization=args.quantization, max_num_seqs=largest,
            max_num_batched_tokens=largest * args.context,
        )  # fmt: skip
        engine = LLMEngine(config)
        precision = args.quantization or str(engine.executor.worker.dtype).removeprefix("torch.")
        with torch.inference_mode():
            ceilings, sizes = measure_ceilings(7), (args.context, args.repeats)
            profiles = {batch: profile_step(engine, ceilings, precision, batch, *sizes) for batch in args.batches}
    for batch, rows in profiles.items():
        show(ceilings, batch, rows)
    batches = {batch: [asdict(row) for row in rows] for batch, rows in profiles.items()}
    finish(args, "step_profile", {"ceilings": asdict(ceilings), "batches": batches}, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
