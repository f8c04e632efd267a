"""What the steps of a run cost, in units of a plain pass, and what of it is padding, waiting and memory.

    python tests/bench.py                                   a small BERT with random weights, invented sentences
    python tests/bench.py --model e5-small --data-dir data  a real encoder, real sentences
    python tests/bench.py --paper                           the first paper's encoders with random weights; memory
    python tests/bench.py --language-model llama --data-dir data      the second method's batches, with adapters
        --random                                            random weights, so that config and tokenizer are enough

Medians over rounds in which everything is measured in turn; only the ratios mean something on another machine.
An encoder's batch of alignment has 16 sentence pairs, one of PoS tagging 32 examples; a language model's have 32.
"""

import argparse
import contextlib
import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import alignfreeze as af  # noqa: E402

SMALL = {"model_type": "bert", "vocab_size": 20_002, "num_hidden_layers": 6, "hidden_size": 256}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 1024, "pad_token_id": 0}
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
PAPER = {  # the configurations on the hub
    "distilbert-base-multilingual-cased": {
        "model_type": "distilbert",
        "vocab_size": 119_547,
        "n_layers": 6,
    },
    "bert-base-multilingual-cased": BASE | {"model_type": "bert", "vocab_size": 119_547},
    "xlm-roberta-base": BASE
    | {"model_type": "xlm-roberta", "vocab_size": 250_002, "max_position_embeddings": 514},
}
GENERATED = ("massive", "xsid", "uner", "translation")
CASES = {  # of a language model: (stage, logits everywhere, checkpointing)
    "task, logits at target positions": ("task", False, False),
    "task, logits at target positions, checkpointing": ("task", False, True),
    "task, logits everywhere": ("task", True, False),
    "task, logits everywhere, checkpointing": ("task", True, True),
    "alignment": ("alignment", False, False),
    "alignment, checkpointing": ("alignment", False, True),
}


# ---------------------------------------------------------------------------------- what is computed


def invented() -> tuple[PreTrainedTokenizerFast, Iterator[af.Pair], list[dict]]:
    """A tokenizer of whole words; sentences as long as in news text, a fifth of the words linked."""
    rng, vocabulary = random.Random(0), [f"w{k}" for k in range(20_000)]
    ids = {word: k for k, word in enumerate(["[PAD]", "[UNK]", *vocabulary])}
    backend = Tokenizer(models.WordLevel(ids, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")

    def length() -> int:
        return min(60, 5 + int(rng.expovariate(1 / 18)))

    def pairs() -> Iterator[af.Pair]:
        while True:
            size = length()
            source, target = (rng.choices(vocabulary, k=size) for _ in range(2))
            yield af.Pair("xx", source, target, [(i, i) for i in range(0, size, 5)])

    examples = []
    for size in [length() for _ in range(2000)]:
        examples.append(
            {"tokens": rng.choices(vocabulary, k=size), "tags": rng.choices(range(17), k=size)}
        )
    return tokenizer, pairs(), list(af.encode_tokens(tokenizer, examples, 96, True))


def real(model: str, data_dir: Path) -> tuple[PreTrainedTokenizerFast, Iterator[af.Pair], list[dict]]:
    """Linked sentence pairs of all languages that there are, and the English treebank."""
    tokenizer, _ = af.load_tokenizer(model)
    streams = []
    for code in codes(data_dir, "dictionary/en-{}.txt"):
        streams.append(af.linked_pairs(code, *af.linker(code, "dictionary", data_dir), 31))
    examples = af.load_udpos("en", "train", af.parse_args(["--data-dir", str(data_dir)]))[:2000]
    pairs = itertools.chain.from_iterable(zip(*streams))
    return tokenizer, pairs, list(af.encode_tokens(tokenizer, examples, 96, True))


def codes(data_dir: Path, *wanted: str) -> list[str]:
    """The languages that have parallel text, and these files."""
    found = [path.stem.removeprefix("en-") for path in sorted(data_dir.glob("parallel/en-*.tsv"))]
    return [code for code in found if all((data_dir / name.format(code)).exists() for name in wanted)]


def loss_by_loops(vectors, queries, targets, temperature=0.1) -> torch.Tensor:
    """`contrastive_loss` with a Python loop over words, as in the authors' code."""
    words, losses = torch.nn.functional.normalize(vectors, dim=-1), []
    for q, t in zip(queries.tolist(), targets.tolist()):
        others = torch.stack([words[q] @ words[w] for w in range(len(words)) if w != q])
        losses.append((others / temperature).logsumexp(0) - words[q] @ words[t] / temperature)
    return torch.stack(losses).mean()


def build(config: dict, device: torch.device) -> torch.nn.Module:
    """An encoder with random weights."""
    torch.manual_seed(0)
    shape = {name: value for name, value in config.items() if name != "model_type"}
    config = AutoConfig.for_model(config["model_type"], num_labels=18, **shape)
    return AutoModelForTokenClassification.from_config(config).to(device).train()


# ----------------------------------------------------------------------------------------- measuring


def measure(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each step, the median over rounds; every round runs each step once, after a first one."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:] or values) for name, values in seconds.items()}


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """The most memory that was held since, in GiB; on a CPU, of the whole process, on Linux only."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def alone(device: torch.device, function: Callable, *args: object) -> Any:
    """What a function of this file returns; on a CPU in a process of its own, for memory is a process's."""
    if device.type == "cuda":
        with contextlib.redirect_stdout(None):
            return function(*args)
    code = f"import json, sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]; import bench; bench.quiet(); "
    code += f"print(json.dumps(bench.{function.__name__}(*{args!r})))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def quiet() -> None:
    af.transformers.utils.logging.set_verbosity_error()
    af.transformers.utils.logging.disable_progress_bar()


def show(title: str, rows: dict[str, object], unit: float | None = None) -> None:
    print(f"\n{title:60}" + (f"{'ratio':>8}{'seconds':>10}" if unit else ""))
    for name, value in rows.items():
        print(
            f"  {name:58}" + (f"{value / unit:8.2f}{value:10.3f}" if unit else f"{value:>8}"), flush=True
        )


# ------------------------------------------------------------------------------------------ encoders


def steps_of(model, tokenizer, pairs, features, device, spec="none", precision="fp32", parts=None):
    """(a step of alignment, one of fine-tuning): forward and backward pass, without the optimiser."""
    parts, how = parts or af.BUCKETS.get(device.type, 1), af.Alignment()
    projection = af.projection_head(model.config.hidden_size).to(device)
    batch = af.encode_pairs(tokenizer, pairs, how, parts, device)
    examples = af.task_batch(features, tokenizer.pad_token_id, parts, device)

    def run(loss: Callable) -> None:
        model.zero_grad()
        with af.frozen(model, spec), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            value = loss()
        value.backward()

    return (
        lambda: run(lambda: af.alignment_loss(model.base_model, projection, batch, how)),
        lambda: run(lambda: af.task_loss(model, examples)),
    )


def plain(model, tokenizer, pairs: list, device, parts: int) -> Callable[[], None]:
    """A forward and backward pass of the whole encoder over the sentences of a batch, and nothing else."""
    batch = af.encode_pairs(tokenizer, pairs, af.Alignment(), parts, device)

    def run() -> None:
        model.zero_grad()
        for inputs in batch.inputs:
            model.base_model(**inputs).last_hidden_state.sum().backward()

    return run


def steps_table(name, model, tokenizer, pairs, features, device, rounds, loops=False) -> dict:
    given, parts, steps = (model, tokenizer, pairs, features, device), af.BUCKETS.get(device.type, 1), {}
    steps["plain pass over the padded batch"] = plain(model, tokenizer, pairs, device, 1)
    if parts > 1:
        steps[f"plain pass, in {parts} parts of similar length"] = plain(
            model, tokenizer, pairs, device, parts
        )
        steps["alignment, the padded batch"], steps["fine-tuning, the padded batch"] = steps_of(
            *given, parts=1
        )
    steps["alignment"], steps["fine-tuning"] = steps_of(*given)
    for spec in ("front", "back", f"emb,0-{model.config.num_hidden_layers // 2 - 1}"):
        steps[f"alignment, {spec} frozen"] = steps_of(*given, spec)[0]
    steps["alignment, bf16"], steps["fine-tuning, bf16"] = steps_of(*given, precision="bf16")
    for fused in (True, False):
        model.zero_grad()
        steps["fine-tuning"]()
        adam = torch.optim.Adam(model.parameters(), 1e-9, fused=fused)
        steps[f"Adam, {'fused' if fused else 'the default'}"] = adam.step
    seconds = measure(steps, rounds, device)
    if loops:  # measured once, for it takes as long as all the others
        seconds |= measure(
            {"alignment, loss by loops over words": with_loops(steps["alignment"])}, 0, device
        )
    title = f"{name}, {model.num_parameters() / 1e6:.0f}M parameters, float32"
    show(title, seconds, seconds["plain pass over the padded batch"])
    return seconds


def with_loops(step: Callable) -> Callable[[], None]:
    def run() -> None:
        usual = af.contrastive_loss
        af.contrastive_loss = lambda *args: loss_by_loops(*args[:4])
        try:
            step()
        finally:
            af.contrastive_loss = usual

    return run


def shares_table(features: list[dict]) -> None:
    """Useful over computed subwords."""

    def length(feature: dict) -> int:
        return len(feature["input_ids"])

    chunks = list(af.in_chunks(iter(random.Random(0).sample(features, len(features))), 32))
    groups = {"training, batches of 32": chunks}
    parts = [af.in_buckets(chunk, af.BUCKETS["cpu"], length) for chunk in chunks]
    groups["training, in 8 parts of similar length"] = [*itertools.chain(*parts)]
    groups["evaluation"] = list(af.in_chunks(iter(sorted(features, key=length)), 32))
    rows = {}
    for name, batches in groups.items():
        computed = sum(len(batch) * max(map(length, batch)) for batch in batches)
        rows[name] = f"{sum(map(length, features)) / computed:.2f}"
    show("useful of computed subwords", rows)


def waiting_table(model, tokenizer, pairs: Iterator, device, steps: int = 8) -> None:
    """How long a step of alignment waits for its batch, made before or after the step before it ends."""
    rows, how = {}, af.Alignment()
    for name, early in (("made when it is needed", False), ("made ahead, by a thread", True)):
        projection = af.projection_head(model.config.hidden_size).to(device)
        batches = itertools.islice(af.alignment_batches(tokenizer, pairs, how, device), steps)
        batches = af.prefetched(batches) if early else batches
        next(batches)
        waited, begin = 0.0, time.perf_counter()
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - start
            if batch is None:
                break
            af.alignment_loss(model.base_model, projection, batch, how).backward()
        rows[f"a batch {name}"] = f"{100 * waited / (time.perf_counter() - begin):.2f}%"
    show("of a step of alignment, waiting for its batch", rows)


def evaluation_table(model, tokenizer, data_dir: Path, seconds: dict, limit: int = 200) -> None:
    """What an evaluation in 34 languages costs, in steps of fine-tuning, from a sample of each test set."""
    args, task, rows = af.parse_args(["--data-dir", str(data_dir)]), af.TASKS["udpos"], {}
    languages = codes(data_dir, "udpos/{}/test.conllu")
    for precision in ("fp32", "bf16"):
        total = 0.0
        for code in languages:
            examples = list(task.load(code, "test", args))
            sample = random.Random(0).sample(examples, min(limit, len(examples)))
            features = af.encode(task, tokenizer, sample, task.test_length, False)
            start = time.perf_counter()
            af.evaluate(model, tokenizer, task, sample, features, precision=precision)
            total += (time.perf_counter() - start) * len(examples) / len(sample) * 34 / len(languages)
        step = seconds["fine-tuning" if precision == "fp32" else "fine-tuning, bf16"]
        rows[precision] = f"{total / step:.0f}"
    model.train()
    show("evaluation in 34 languages, in steps of fine-tuning", rows)


def memory_of(name: str, model: str, data_dir: str, device: str, precision: str) -> float:
    """Three steps of either stage with Adam, then the peak in GiB."""
    device = af.set_up_device(device)
    tokenizer, pairs, features = real(model, Path(data_dir)) if data_dir else invented()
    encoder, training = build(PAPER[name], device), af.Training(precision=precision)
    forget_peak(device)
    af.realign(encoder, tokenizer, pairs, 3, training=training)
    af.finetune(encoder, tokenizer, features[:96], 1, training)
    return peak(device)


def encoders(args: argparse.Namespace, device: torch.device) -> None:
    tokenizer, pairs, features = real(args.model, args.data_dir) if args.model else invented()
    chunk, examples = list(itertools.islice(pairs, 16)), features[:32]
    whole = af.encode_pairs(tokenizer, chunk, af.Alignment())
    useful, padded = (
        int(whole.inputs[0]["attention_mask"].sum()),
        whole.inputs[0]["attention_mask"].numel(),
    )
    print(
        f"16 sentence pairs: {useful} subwords, {padded} with padding; {len(whole.places)} words, ",
        end="",
    )
    print(
        f"{len(whole.queries)} queries; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if args.paper is not None:
        memory = {}
        for name in args.paper or PAPER:
            steps_table(
                name, build(PAPER[name], device), tokenizer, chunk, examples, device, args.rounds
            )
            for precision in ("fp32", "bf16"):
                given = name, args.model, str(args.data_dir or ""), str(device), precision
                memory[f"{name}, {precision}"] = f"{alone(device, memory_of, *given):.1f} GiB"
        show("peak memory of both stages, nothing frozen", memory)
        return
    if args.model:
        model = AutoModelForTokenClassification.from_pretrained(
            args.model, num_labels=18, dtype=torch.float32
        )
        model = model.to(device).train()
    else:
        model = build(SMALL, device)
    name = Path(args.model or "a small BERT").name
    seconds = steps_table(
        name, model, tokenizer, chunk, examples, device, args.rounds, loops=args.rounds > 1
    )
    shares_table(features)
    waiting_table(model, tokenizer, pairs, device)
    if args.model:
        evaluation_table(model, tokenizer, args.data_dir, seconds)


# ----------------------------------------------------------------------------------- language models


def logits_everywhere(model, batch: af.TaskBatch) -> torch.Tensor:
    """`task_loss` by the library's own path: logits at all positions, labels that it shifts itself."""
    total = 0.0
    for inputs, wanted in zip(af.with_embeddings(model, batch.inputs), batch.labels):
        labels = wanted.roll(1, 1)
        labels[:, 0] = af.IGNORE
        total = total + model(**inputs, labels=labels).loss * (labels != af.IGNORE).sum()
    return total / batch.count


def untrained(folder: str, head: type, **options: Any) -> torch.nn.Module:
    """In the place of `load_model`: random weights."""
    return head.from_config(AutoConfig.from_pretrained(folder), **options)


def language_case(
    name: str, folder: str, data_dir: str, device: str, rounds: int, random_weights: bool
) -> list[float]:
    """[loss, seconds, GiB before, GiB at the peak] of a batch of a case, forward and backward."""
    stage, everywhere, checkpointing = CASES[name]
    task = next(task for task in GENERATED if (Path(data_dir) / task).is_dir())
    argv = [
        "--method",
        "mid-align",
        "--model",
        folder,
        "--task",
        task,
        "--data-dir",
        data_dir,
        "--device",
        device,
    ]
    args = af.parse_args([*argv, *["--checkpointing"] * checkpointing])
    af.settle(args)
    device = args.device
    tokenizer, config = af.load_tokenizer(folder, generates=True)
    loading, af.load_model = af.load_model, untrained if random_weights else af.load_model
    with device:
        model = af.build_model(args, tokenizer).train()
    af.load_model = loading
    parts = af.BUCKETS.get(device.type, 1)
    if stage == "task":
        sources = sorted(path.parent.name for path in Path(data_dir, task).glob("*/train.*"))
        loaded = [list(af.TASKS[task].load(code, "train", args))[:32] for code in sources]
        examples = [row for rows in loaded for row in rows]
        examples = random.Random(0).sample(examples, min(args.batch_size, len(examples)))
        longest = min(args.max_length, tokenizer.model_max_length)
        features = af.encode(af.TASKS[task], tokenizer, examples, longest, True)
        batch = af.task_batch(features, tokenizer.pad_token_id, parts, device)
        loss = logits_everywhere if everywhere else af.task_loss
        step = lambda: loss(model, batch)  # noqa: E731
    else:
        longest = min(args.realign_max_length, tokenizer.model_max_length)
        layer = min(args.layer if random_weights else 11, config.num_hidden_layers)
        how = af.Alignment(
            unit="sentence", layer=layer, batch_size=args.realign_batch_size, max_length=longest
        )
        streams = []
        for code in codes(args.data_dir):
            text = af.linker(code, "none", args.data_dir, limit=1000)
            streams.append(af.linked_pairs(code, *text, 1))
        pairs = itertools.chain.from_iterable(zip(*streams))
        batch = next(af.alignment_batches(tokenizer, pairs, how, device))
        projection = af.projection_head(config.hidden_size, how.unit)  # of sentences: none
        step = lambda: af.alignment_loss(model.base_model, projection, batch, how)  # noqa: E731
    losses = []

    def run() -> None:
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
            value = step()
        value.backward()
        losses.append(value.item())  # waits for the device

    forget_peak(device)
    before = peak(device)
    (seconds,) = measure({name: run}, rounds, device).values()
    return [losses[0], seconds, before, peak(device)]


def language_model(args: argparse.Namespace, device: torch.device) -> None:
    print(f"{Path(args.language_model).name}, adapters; {device}, {torch.get_num_threads()} threads")
    print(f"{'':50}{'loss':>8}{'seconds':>10}{'GiB before':>12}{'at the peak':>13}")
    for name in CASES:
        given = name, args.language_model, str(args.data_dir), str(device), args.rounds, args.random
        loss, seconds, before, most = alone(device, language_case, *given)
        print(f"{name:50}{loss:8.3f}{seconds:10.3f}{before:12.2f}{most:13.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder or hub id of an encoder (default: a small BERT, random weights)"
    )
    parser.add_argument("--language-model", help="instead, folder of a decoder-only language model")
    parser.add_argument(
        "--random", action="store_true", help="give it random weights, of its config alone"
    )
    parser.add_argument("--data-dir", type=Path, help="real sentences, as for alignfreeze.py")
    parser.add_argument(
        "--paper", nargs="*", choices=PAPER, help="instead, the paper's encoders (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="as for alignfreeze.py")
    args = parser.parse_args()
    if bool(args.model or args.language_model) != bool(args.data_dir) or (
        args.model and args.language_model
    ):
        parser.error("--data-dir goes with one of --model and --language-model")
    if args.paper is not None and args.model and len(af.load_tokenizer(args.model)[0]) > 119_547:
        parser.error(f"--paper: the vocabulary of {args.model} is larger than that of multilingual BERT")
    device = af.set_up_device(args.device)
    (language_model if args.language_model else encoders)(args, device)


if __name__ == "__main__":
    quiet()
    main()
